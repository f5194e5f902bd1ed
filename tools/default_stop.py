"""Ending between two pieces of work, where a signal asked for it: a process that ends within a step crashes."""

import signal

from crystallm_jax.training.stop import StopRequest, TrainingStoppedError


def leave_if_asked(stop: StopRequest) -> None:
    """Go on, unless SIGTERM or Ctrl-C came.

    Raises:
        TrainingStoppedError: it came.
    """
    if stop.agreed():
        number = stop.signal_number or signal.SIGTERM
        raise TrainingStoppedError(
            number, f"{signal.Signals(number).name}: stopped; the same command goes on"
        )
