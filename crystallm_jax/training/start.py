"""Where a run begins: from scratch, from other weights, or from where its folder stands."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from crystallm_jax.data.feed import Feed
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.load import crop_block_size, load_weights
from crystallm_jax.training.metrics import METRICS_FILE
from crystallm_jax.training.moments import crop_training, load_training, moved_state
from crystallm_jax.training.step import CompiledSteps, TrainState, initial_state

logger = logging.getLogger(__name__)

_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
# Which arrays there are beside the parameters, and how those are stacked.
_STATE_KEYS = ("layers", "optimizer", "ema_decay")


class Start(NamedTuple):
    """The state to begin with, the steps that it has taken, and where a resumed run's patience stood."""

    state: TrainState
    step: int
    patience: dict[str, Any] | None = None


def start(
    config: TrainConfig,
    model_config: ModelConfig,
    steps: CompiledSteps,
    checkpoints: Checkpoints,
    feed: Feed,
) -> Start:
    """The state to begin with; the feed is set to the same place.

    Raises:
        CrystallmError: what is asked for is not there, is of another shape, or would overwrite a run.
    """
    newest = checkpoints.latest_step()
    resuming = config.init_from == "resume" or (config.existing_run == "resume" and newest is not None)
    if resuming:
        saved = checkpoints.describe()
        _check_shape(dataclasses.asdict(model_config), saved["model"], str(checkpoints.folder))
        _check_state(config, saved["train"], str(checkpoints.folder))
        restored = checkpoints.restore(steps.abstract)
        feed.set_state(restored.data_state)
        return Start(restored.state, restored.step, restored.description.get("patience"))
    if newest is not None:
        raise ConfigError(
            f"{config.out_dir} already holds a run at step {newest}: use init_from=resume, existing_run=resume or"
            " another out_dir"
        )
    if config.existing_run == "resume" and (Path(config.out_dir) / METRICS_FILE).is_file():
        logger.warning("%s: holds no checkpoint to go on from: begun anew", config.out_dir)
    if config.init_from == "scratch":
        return Start(initial_state(config, model_config, steps), 0)
    if config.init_state == "all":
        return _moved(config, model_config, steps, feed)
    weights = crop_block_size(load_weights(config.init_from), config.block_size, place=config.init_from)
    _check_shape(dataclasses.asdict(model_config), dataclasses.asdict(weights.config), config.init_from)
    return Start(initial_state(config, model_config, steps, weights.params), 0)


def _moved(config: TrainConfig, model_config: ModelConfig, steps: CompiledSteps, feed: Feed) -> Start:
    """Go on where another run stood, with what comes then in the order of this run's own data."""
    weights = crop_training(load_training(config.init_from), config.block_size, place=config.init_from)
    _check_shape(dataclasses.asdict(model_config), dataclasses.asdict(weights.config), config.init_from)
    state = moved_state(config, steps, weights, place=config.init_from)
    step = int(state.step)
    logger.info("%s: its run stood at step %d, and goes on here", config.init_from, step)
    feed.go_to(step)
    return Start(state, step)


def _check_shape(wanted: dict[str, Any], found: dict[str, Any], place: str) -> None:
    differing = [key for key in _SHAPE_KEYS if wanted[key] != found[key]]
    if differing:
        its, ours = (" ".join(f"{key}={shape[key]}" for key in differing) for shape in (found, wanted))
        raise ModelError(f"{place}: its model has {its}, the configuration says {ours}")


def _check_state(config: TrainConfig, saved: dict[str, Any], place: str) -> None:
    """Refuse settings under which the saved state would have other arrays."""
    for key in _STATE_KEYS:
        now = getattr(config, key)
        was = saved.get(key, now)
        # Of an average it matters whether there is one.
        if was != now and (key != "ema_decay" or 0 in (was, now)):
            raise ModelError(
                f"{place}: the run was trained with {key}={was}, now {key}={now} would need another state: set {key}"
                " back, or begin a new run with init_from=RUN_FOLDER"
            )
