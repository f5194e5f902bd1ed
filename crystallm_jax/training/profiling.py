"""A trace of some steps of a run, for XProf and Perfetto."""

import logging
from pathlib import Path
from typing import Self

import jax

PROFILE_FOLDER = "profile"
# Compilation and the caches' warming up are over by then.
FIRST_TRACED = 10

logger = logging.getLogger(__name__)


class Profile:
    """Traces steps of one session, the tenth and those after it; a context manager that ends a trace under way.

    It is told of each step when its figures are fetched: the step after it runs by then. So the trace begins in the
    middle of a step, holds the steps asked for whole, and ends in the middle of another.

    Args:
        folder: where the trace goes.
        first_step: steps taken before this session.
        steps: how many to trace; 0 traces none.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int) -> None:
        self._folder = folder
        self._steps = steps
        self._first = first_step + FIRST_TRACED
        self._traced = 0
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
        elif self._steps:
            logger.warning(
                "profile_steps=%d: no trace was written, the run ended before its step %d",
                self._steps,
                self._first,
            )

    def reported(self, step: int) -> bool:
        """Take note that a step's figures were fetched; returns whether a trace was begun or written, which takes time.

        Args:
            step: its number.
        """
        if self._running:
            self._traced = step - self._first + 1
            if self._traced >= self._steps:
                self._stop()
                return True
        elif self._steps and step == self._first - 2:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would make it hundreds of megabytes
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
            return True
        return False

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self._steps = 0
        logger.info(
            "a trace of %d steps from step %d on is in %s: pip install xprof and xprof --logdir %s, or open its"
            " .trace.json.gz in ui.perfetto.dev",
            max(self._traced, 0),
            self._first,
            self._folder,
            self._folder,
        )
