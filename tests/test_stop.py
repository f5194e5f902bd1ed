"""How a run ends where it is told to stop."""

import os
import signal

import pytest

from crystallm_jax.training.stop import EXIT_AGAIN, TrainingStoppedError, stop_at_once, stop_signals


def test_sigterm_between_steps_ends_the_run_at_once_with_the_code_to_run_it_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStoppedError, match="nothing is lost") as caught, stop_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == EXIT_AGAIN
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_a_step_is_noted_and_a_second_one_kills_as_usual() -> None:
    with stop_at_once():
        between = signal.getsignal(signal.SIGTERM)
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.agreed()
            assert request.signal_number == signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is between
