"""How a run is asked to stop: signals, collected instead of died of."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from crystallm_jax.errors import CrystallmError


class TrainingStoppedError(CrystallmError):
    """A signal ended the run; its last state is saved. The exit code is the shell's for that signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """Whether the run was asked to stop, as all its processes see it at the same step.

    Attributes:
        signal_number: of the signal that asked, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def agreed(self, step: int) -> bool:  # noqa: ARG002  several processes agree on a step
        """Whether to stop after this step."""
        return self.signal_number is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one kills as usual."""
    request = StopRequest()
    previous: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, previous[number])

    for watched in (signal.SIGTERM, signal.SIGINT):
        previous[watched] = signal.signal(watched, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
