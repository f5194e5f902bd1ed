"""The errors that a user can cause: one line that says what, where and the mend."""


class CrystallmError(Exception):
    """Base of every error whose message is meant for the user.

    Attributes:
        exit_code: what the command line exits with after printing the message.
    """

    exit_code = 1


class CIFError(CrystallmError, ValueError):
    """A CIF text, structure, composition or space group that the dialect cannot express."""


class ConfigError(CrystallmError, ValueError):
    """A configuration key or value that cannot be used."""

    exit_code = 2


class DataError(CrystallmError, ValueError):
    """An input file or prepared folder that cannot be read."""


class ModelError(CrystallmError, ValueError):
    """A checkpoint or model folder that cannot be loaded."""


class SamplingError(CrystallmError, ValueError):
    """A request for samples that cannot be honoured."""
