"""The moments of another run, in the state of one that goes on where it stood."""

from typing import Any

import jax
import numpy as np
import optax

from crystallm_jax.errors import ModelError
from crystallm_jax.model.stacking import stacked
from crystallm_jax.models.model import Model, Training, Tree
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.step import CompiledSteps, TrainState


def moved_state(config: TrainConfig, steps: CompiledSteps, weights: Model, *, place: str) -> TrainState:
    """The state of a run that goes on where another stood, sharded as `steps` asks.

    Steps that the other skipped, for losses that were not finite, count for the schedule as taken. A moving average
    begins anew from the parameters.

    Args:
        config: of the run that goes on.
        steps: of the same.
        weights: with their training.
        place: where they come from, for messages.

    Raises:
        ModelError: they have no moments, or the run uses another optimiser than AdamW.
    """
    training = weights.training or Training(0)
    if config.optimizer != "adamw":
        raise ModelError(f"{place}: its moments are AdamW's: init_state=all needs optimizer=adamw")
    moments = training.moments
    if moments is None:
        raise ModelError(f"{place}: keeps no moments of an optimiser: use init_state=weights")

    step: Any = np.int32(training.step)

    def arranged(tree: Tree) -> Tree:
        return stacked(tree, config.n_layer) if config.layers == "scanned" else tree

    def filled(part: Any) -> Any:
        match part:
            case optax.ScaleByAdamState():
                updates = np.int32(moments.updates)
                return optax.ScaleByAdamState(updates, arranged(moments.first), arranged(moments.second))
            case optax.ScaleByScheduleState():
                return optax.ScaleByScheduleState(step)
        return part

    params = arranged(weights.params)
    state = TrainState(
        step=step,
        params=params,
        opt_state=jax.tree.map(
            filled,
            steps.abstract.opt_state,
            is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState | optax.ScaleByScheduleState),
        ),
        skipped=np.zeros_like(step),
        ema=params if config.ema_decay > 0 else None,
    )
    # Without the copy, donating the state would delete the caller's arrays.
    return jax.tree.map(lambda leaf, sharding: jax.device_put(leaf, sharding).copy(), state, steps.shardings)
