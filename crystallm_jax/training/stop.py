"""How a run is asked to stop: signals, collected instead of died of."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from crystallm_jax.errors import CrystallmError

# EX_TEMPFAIL: the same command may succeed later. A scheduler can put the run back into its queue on it.
EXIT_AGAIN = 75
_AS_USUAL: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class TrainingStoppedError(CrystallmError):
    """A signal ended the run; its last state is saved.

    The exit code is that of a failure that passes for SIGTERM, which schedulers send, and the shell's for Ctrl-C.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = EXIT_AGAIN if signal_number == signal.SIGTERM else 128 + signal_number


class StopRequest:
    """Whether the run was asked to stop, as all its processes see it at the same step.

    Args:
        greatest: of a number given by each process, the greatest; None where there is one process. Ours is not jax's
            preemption sync point: that one hears SIGTERM alone, through a handler that would replace this one.

    Attributes:
        signal_number: of the signal that asked, or None.
    """

    def __init__(self, greatest: Callable[[int], int] | None = None) -> None:
        self._greatest = greatest
        self.signal_number: int | None = None

    def agreed(self) -> bool:
        """Whether to stop after this step; to be asked once a step, by all."""
        if self._greatest is None:
            return self.signal_number is not None
        number = self._greatest(self.signal_number or 0)
        if number:
            self.signal_number = number
        return number > 0


@contextlib.contextmanager
def stop_signals(greatest: Callable[[int], int] | None = None) -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one kills as usual."""
    request = StopRequest(greatest)
    previous: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, _AS_USUAL[number])

    for watched in (signal.SIGTERM, signal.SIGINT):
        previous[watched] = signal.signal(watched, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Let SIGTERM end a run where there is nothing to save: before its steps and behind them.

    Ctrl-C does so by itself. Only the main thread can.

    Raises:
        TrainingStoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise TrainingStoppedError(
            number,
            "SIGTERM: stopped between steps, nothing is lost; the same command goes on (existing_run=resume)",
        )

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
