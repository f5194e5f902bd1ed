"""Signals: an interruption is never lost, wherever Python was when it came."""

import gc
import signal
from collections.abc import Callable, Iterator

import pytest

from crystallm_jax.processes import TerminatedError, terminate_as_interrupt


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C is heeded, which it is not where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _in_a_collection(action: Callable[[], None]) -> None:
    """Run an action in a callback of the garbage collector, as JAX has one: Python drops what it raises."""

    def callback(phase: str, _: object) -> None:
        if phase == "stop":
            action()

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_whose_exception_python_drops_still_ends_the_run(
    number: signal.Signals, kind: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with terminate_as_interrupt() as interruption:
        interruption.check()
        _in_a_collection(lambda: signal.raise_signal(number))
        with pytest.raises(kind) as raised:
            interruption.check()
        assert raised.type is kind
    assert capfd.readouterr().err == ""
    assert signal.getsignal(number) == before


def test_a_signal_raises_at_once_where_it_can() -> None:
    with terminate_as_interrupt(), pytest.raises(TerminatedError):
        signal.raise_signal(signal.SIGTERM)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminate_as_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
