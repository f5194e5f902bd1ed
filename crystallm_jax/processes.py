"""Processes: how many workers, how they start, and how a run ends when it is told to."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import SpawnContext
from types import FrameType

# Spawned, never forked: JAX may have started threads, which a forked child would find dead.
SPAWN: SpawnContext = multiprocessing.get_context("spawn")


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: it ends the run as Ctrl-C does."""


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, through the cleaning up; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  the signature of a handler
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
