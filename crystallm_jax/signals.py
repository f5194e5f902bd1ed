"""How a run is told to stop: by SIGTERM, which schedulers send, or by Ctrl-C.

Either asks to stop: what is done is saved or kept, and the command ends with 75 after SIGTERM, with 130 after Ctrl-C.
The 75 is EX_TEMPFAIL, on which a scheduler can put the command back into its queue: given again (to `sample` with
`--resume`), it goes on.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_AGAIN = os.EX_TEMPFAIL
EXIT_INTERRUPTED = 128 + signal.SIGINT
_AS_USUAL: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


def exit_code(number: int) -> int:
    """What a command ends with after this signal."""
    return EXIT_AGAIN if number == signal.SIGTERM else EXIT_INTERRUPTED


class StoppedError(KeyboardInterrupt):
    """A signal ended the run; what is done is kept.

    It is no `Exception`, as Ctrl-C's is none: what handles errors lets it pass.

    Attributes:
        exit_code: of the command.
        agreed: all processes of the run stop, after the same step.
    """

    def __init__(self, number: int, state: str = "", *, agreed: bool = False) -> None:
        super().__init__(f"{signal.Signals(number).name}: {state}" if state else "interrupted")
        self.exit_code = exit_code(number)
        self.agreed = agreed


class StopRequest:
    """Whether the run was asked to stop; where several processes run together, as all see it at the same step.

    Args:
        state: how things stand between two pieces of work, for the message.
        greatest: of a number given by each process, the greatest; None where there is one process, or where each ends
            by itself. Ours is not jax's preemption sync point: that one hears SIGTERM alone, through a handler that
            would replace this one.

    Attributes:
        signal_number: of the signal that asked, or None.
    """

    def __init__(self, state: str = "", *, greatest: Callable[[int], int] | None = None) -> None:
        self._state, self._greatest = state, greatest
        self.signal_number: int | None = None

    def agreed(self) -> bool:
        """Whether to stop after this step; to be asked once a step, by all."""
        if self._greatest is None:
            return self.signal_number is not None
        number = self._greatest(self.signal_number or 0)
        if number:
            self.signal_number = number
        return number > 0

    def check(self) -> None:
        """Stop here, between two pieces of work, if that was asked for.

        Raises:
            StoppedError: it was.
        """
        if self.agreed():
            raise self.stopped(self._state)

    def stopped(self, state: str) -> StoppedError:
        """The error that says that the run has stopped, and how things stand."""
        agreed = self._greatest is not None
        return StoppedError(self.signal_number or signal.SIGTERM, state, agreed=agreed)


@contextlib.contextmanager
def stop_between(state: str = "", *, greatest: Callable[[int], int] | None = None) -> Iterator[StopRequest]:
    """Note SIGTERM and Ctrl-C, for work that asks between its steps; a second one kills as usual.

    The arguments are those of `StopRequest`.
    """
    request = StopRequest(state, greatest=greatest)

    def note(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, _AS_USUAL[number])

    with _handled(note):
        yield request


@contextlib.contextmanager
def stop_at_once(state: str = "") -> Iterator[StopRequest]:
    """Let SIGTERM and Ctrl-C end the work where it is, through its cleaning up; `state` says how things stand then.

    The exception that a signal raises can be lost: Python drops what is raised while it runs a finaliser or a callback
    of the garbage collector, and JAX installs one of those. Long work therefore checks the request between its pieces.

    Raises:
        StoppedError: a signal came.
    """
    request = StopRequest(state)
    others = sys.unraisablehook

    def leave(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        raise StoppedError(number, state)

    def report(unraisable: Any) -> None:
        # An interruption that was lost is noted: its traceback would only frighten.
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            others(unraisable)

    with _handled(leave):
        sys.unraisablehook = report
        try:
            yield request
        finally:
            if sys.unraisablehook is report:
                sys.unraisablehook = others


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler hear of both signals; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Where Ctrl-C is ignored, as behind nohup or in a shell's background, it stays so.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    watched = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in watched}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)
