"""A schedule that time ends: when the rate begins to fall, how far it has fallen, and what the optimiser is told.

The compiled step takes the rate from the optimiser's own count of updates. So the rate follows the clock, whatever the
speed turns out to be, where that count is set before each step of the decay: nothing is compiled anew.
"""

import time
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import optax

from crystallm_jax.errors import ConfigError
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.step import TrainState


@dataclass
class Clock:
    """How far a run is.

    Attributes:
        started: when the process began, of `time.monotonic()`.
        until: seconds after that at which everything must be written.
        reserve: of them, those for the last evaluation and for writing.
        decay_share: of the time of training (or of `max_steps`), the part at its end in which the rate falls.
        max_steps: steps, of all calls together, after which the run ends in any case.
    """

    started: float
    until: float
    reserve: float
    decay_share: float
    max_steps: int | None = None
    _begun: float = field(default=0.0, init=False)

    def check(self) -> None:
        """Refuse settings that leave no time.

        Raises:
            ConfigError: they do.
        """
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"--decay-share {self.decay_share:g}: must be above 0 and at most 1")
        if self.until - self.reserve <= self.elapsed():
            raise ConfigError(
                f"--until {self.until:g}: {self.elapsed():.0f} s are gone and {self.reserve:g} s are kept to write"
                " (--reserve), so that none is left to train: give more"
            )

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self.started

    def begin(self) -> None:
        """Training begins now: everything is compiled."""
        self.check()
        self._begun = self.elapsed()

    def progress(self, step: int) -> float:
        """How far the decay is after so many steps: below 0 before it, 1 and more at its end."""
        end = self.until - self.reserve
        found = _progress(self.elapsed(), self._begun, end, self.decay_share)
        if self.max_steps is None:
            return found
        return max(found, _progress(step, 0, self.max_steps, self.decay_share))


def _progress(now: float, begun: float, end: float, share: float) -> float:
    decay_from = end - share * (end - begun)
    return (now - decay_from) / (end - decay_from)


def decayed_rate(config: TrainConfig, progress: float) -> float:
    """The rate so far into the decay."""
    return config.learning_rate + min(max(progress, 0.0), 1.0) * (config.min_lr - config.learning_rate)


def at_decay(state: TrainState, config: TrainConfig, progress: float) -> TrainState:
    """A state whose next update has the rate of so far into the decay.

    Args:
        state: before the update.
        config: of a `wsd` schedule with stages so long that counting alone never leaves the first.
        progress: from 0 to 1.
    """
    count = np.int32(config.max_iters - config.decay_iters + int(progress * config.decay_iters))

    def moved(node: object) -> object:
        if not isinstance(node, optax.ScaleByScheduleState):
            return node
        return node._replace(count=jax.device_put(count, node.count.sharding))

    opt_state = jax.tree.map(
        moved, state.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState)
    )
    return replace(state, opt_state=opt_state)
