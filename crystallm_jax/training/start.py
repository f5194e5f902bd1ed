"""Where a run begins: from scratch, from other weights, or from where its folder stands."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from crystallm_jax.data.feed import Feed
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.models.crop import crop_block_size, crop_training
from crystallm_jax.models.kinds import read_model, read_training
from crystallm_jax.models.locate import locate
from crystallm_jax.models.runs import run_of
from crystallm_jax.train_run.metrics import METRICS_FILE
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.moments import moved_state
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
    weights = crop_block_size(read_model(config.init_from), config.block_size, place=config.init_from)
    _check_shape(dataclasses.asdict(model_config), dataclasses.asdict(weights.config), config.init_from)
    return Start(initial_state(config, model_config, steps, weights.params), 0)


def _moved(config: TrainConfig, model_config: ModelConfig, steps: CompiledSteps, feed: Feed) -> Start:
    """Go on where another run stood, with what comes then in the order of this run's own data."""
    state = _branched(config, model_config, steps)
    if state is None:
        state = _converted(config, model_config, steps)
    step = int(state.step)
    logger.info("%s: its run stood at step %d, and goes on here", config.init_from, step)
    if step >= config.max_iters and not config.eval_only:
        raise ConfigError(
            f"{config.init_from}: its run stood at step {step}, and max_iters={config.max_iters} is none more: raise it"
        )
    feed.go_to(step)
    return Start(state, step)


def _branched(config: TrainConfig, model_config: ModelConfig, steps: CompiledSteps) -> TrainState | None:
    """All of a run's state as it is, its average too; None where it is to be converted.

    AdamW's moments can be cropped and stacked otherwise; Muon's are taken as they are.
    """
    found = run_of(locate(config.init_from))
    if found is None:
        return None
    with Checkpoints(found.folder / CHECKPOINTS_FOLDER) as theirs:
        saved = theirs.describe(found.step)
        settings = saved.get("train", {})
        try:
            _check_shape(dataclasses.asdict(model_config), saved.get("model", {}), config.init_from)
            _check_state(config, settings, config.init_from)
        except ModelError:
            if "muon" in (config.optimizer, settings.get("optimizer")):
                raise
            return None
        return theirs.restore(steps.abstract, found.step).state


def _converted(config: TrainConfig, model_config: ModelConfig, steps: CompiledSteps) -> TrainState:
    """A state around the parameters and moments of any model that has them, cropped and stacked as is asked."""
    weights = crop_training(read_training(config.init_from), config.block_size, place=config.init_from)
    _check_shape(dataclasses.asdict(model_config), dataclasses.asdict(weights.config), config.init_from)
    return moved_state(config, steps, weights, place=config.init_from)


def _check_shape(wanted: dict[str, Any], found: dict[str, Any], place: str) -> None:
    differing = [key for key in _SHAPE_KEYS if wanted[key] != found.get(key)]
    if differing:
        its, ours = (" ".join(f"{key}={shape.get(key)}" for key in differing) for shape in (found, wanted))
        raise ModelError(f"{place}: its model has {its}, the configuration says {ours}")


def _check_state(config: TrainConfig, saved: dict[str, Any], place: str) -> None:
    """Refuse settings under which the saved state would have other arrays."""
    for key in _STATE_KEYS:
        if _is_other(config, saved, key):
            was, now = saved[key], getattr(config, key)
            raise ModelError(
                f"{place}: the run was trained with {key}={was}, now {key}={now} would need another state: set {key}"
                " back, or begin a new run with init_from=RUN_FOLDER"
            )


def _is_other(config: TrainConfig, saved: dict[str, Any], key: str) -> bool:
    """Whether a setting asks for other arrays than were saved; of an average it matters whether there is one."""
    now = getattr(config, key)
    was = saved.get(key, now)
    return was != now and (key != "ema_decay" or 0 in (was, now))
