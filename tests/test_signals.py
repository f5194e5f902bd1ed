"""Signals: a run that is told to stop does, wherever Python was when it was told, and the code says what to do then."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from crystallm_jax.signals import StoppedError, StopRequest, stop_at_once, stop_between


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
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_whose_exception_python_drops_still_ends_the_run(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_at_once() as stop:
        stop.check()
        _in_a_collection(lambda: signal.raise_signal(number))
        with pytest.raises(StoppedError, match="interrupted") as raised:
            stop.check()
        assert raised.value.exit_code == code
    assert capfd.readouterr().err == ""
    assert signal.getsignal(number) == before


def test_a_signal_raises_at_once_where_it_can() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM: nothing is lost"), stop_at_once("nothing is lost"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_handles_errors_lets_a_stop_pass() -> None:
    assert not issubclass(StoppedError, Exception)
    assert issubclass(StoppedError, KeyboardInterrupt)


def test_sigterm_in_a_step_is_noted_and_a_second_one_kills_as_usual() -> None:
    with stop_at_once():
        at_once = signal.getsignal(signal.SIGTERM)
        with stop_between("all is saved") as stop:
            stop.check()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed()
            with pytest.raises(StoppedError, match="SIGTERM: all is saved") as raised:
                stop.check()
            assert raised.value.exit_code == 75
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is at_once


def test_a_signal_to_another_process_stops_this_one() -> None:
    answers = iter((0, 0, signal.SIGINT))
    stop = StopRequest(greatest=lambda _: next(answers))
    assert [stop.agreed() for _ in range(3)] == [False, False, True]
    assert stop.stopped("saved").exit_code == 130


def test_outside_the_main_thread_nothing_is_heard() -> None:
    before, heard = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        with stop_at_once(), stop_between():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join(10)
    assert heard == [before]


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_at_once(), stop_between():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
