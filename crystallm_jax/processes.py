"""Processes: how many workers, how they start, and how a run ends when it is told to."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import SpawnContext
from types import FrameType
from typing import Any

# Spawned, never forked: JAX may have started threads, which a forked child would find dead.
SPAWN: SpawnContext = multiprocessing.get_context("spawn")


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: it ends the run as Ctrl-C does."""


class Interruption:
    """Whether SIGTERM or Ctrl-C came; long work checks it between its pieces.

    The exception that a signal raises can be lost: Python drops what is raised while it runs a finaliser or a callback
    of the garbage collector, and JAX installs one of those.
    """

    def __init__(self) -> None:
        self._kind: type[KeyboardInterrupt] | None = None

    def note(self, kind: type[KeyboardInterrupt]) -> None:
        """Remember that the run is to end, and how."""
        self._kind = kind

    def check(self) -> None:
        """End the run if a signal asked for it and the exception was lost.

        Raises:
            KeyboardInterrupt: as the signal did; a TerminatedError for SIGTERM.
        """
        if self._kind is not None:
            raise self._kind


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[Interruption]:
    """Let SIGTERM end the run as Ctrl-C does, through the cleaning up; only the main thread can."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  the signature of a handler
        kind = TerminatedError if number == signal.SIGTERM else KeyboardInterrupt
        interruption.note(kind)
        raise kind

    watched = [signal.SIGTERM]
    # Where Ctrl-C is ignored, as behind nohup or in a shell's background, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        watched.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in watched}
    others = sys.unraisablehook

    def report(unraisable: Any) -> None:
        # An interruption that was lost is noted: its traceback would only frighten.
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            others(unraisable)

    sys.unraisablehook = report
    try:
        yield interruption
    finally:
        sys.unraisablehook = others
        for number, handler in before.items():
            signal.signal(number, handler)
