"""What lies where in a run folder, told by names alone."""

from pathlib import Path

from crystallm_jax.data.store import SPLITS
from crystallm_jax.errors import DataError
from crystallm_jax.train_run.metrics import METRICS_FILE

CHECKPOINTS_FOLDER = "checkpoints"
CONFIG_FILE = "config.yaml"


def is_checkpoint(path: Path) -> bool:
    """Whether this is one of a run's checkpoints."""
    return path.parent.name == CHECKPOINTS_FOLDER and path.name.isdecimal() and path.is_dir()


def is_run(folder: Path) -> bool:
    """Whether this is a folder that `crystallm train` wrote to.

    Raises:
        DataError: it may not be looked into.
    """
    parts = (METRICS_FILE, CHECKPOINTS_FOLDER)
    try:
        return (
            (folder / CONFIG_FILE).is_file()
            and any((folder / part).exists() for part in parts)
            and not any((folder / f"{split}.bin").is_file() for split in SPLITS)
        )
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def saved_steps(folder: Path) -> tuple[int, ...]:
    """Steps of the complete checkpoints in a folder of them: those being written have longer names.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    return tuple(sorted(int(path.name) for path in found if path.name.isdecimal()))
