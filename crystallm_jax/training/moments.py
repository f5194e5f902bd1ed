"""The moments of a run: out of its checkpoints, and into the state of another run that goes on where it stood."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from crystallm_jax.convert.arrange import flattened, params_from_named
from crystallm_jax.convert.detect import kind_of_file, kind_of_folder
from crystallm_jax.convert.folder import read_folder_training
from crystallm_jax.convert.published import read_published_training
from crystallm_jax.convert.sources import bare_name, locate, read_archive
from crystallm_jax.convert.weights import Moments, Training, Tree, Weights
from crystallm_jax.errors import ModelError
from crystallm_jax.model.layout import stacked
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.load import crop_block_size, load_weights, run_model_config, run_of
from crystallm_jax.training.runfolder import CHECKPOINTS_FOLDER
from crystallm_jax.training.step import CompiledSteps, TrainState

# Where optax's Adam keeps its state in the optimiser's: what has moments comes first.
_ADAM = ("opt_state", "0")
# Settings that are places on the machine that trained.
_PATHS = ("out_dir", "dataset", "init_from")
_WANTED = ("params", "opt_state")


def load_training(path: str | Path) -> Weights:
    """Read a model with all that its training needs to go on.

    Args:
        path: a `ckpt.pt` or its archive, a model folder, a run, or a checkpoint of one; models of other kinds, which
            have no place for moments, are read without.

    Raises:
        ModelError: nothing of the kind is there, or it is damaged.
    """
    path = locate(path)
    if path.is_file():
        match kind_of_file(path):
            case "published" | "unknown":
                return read_published_training(path)
            case "archive":
                return read_archive(path, read_published_training)
        return load_weights(path)
    match kind_of_folder(path):
        case "folder":
            return read_folder_training(path)
        case "huggingface":
            return load_weights(path)
        case "none":
            run, step = run_of(path)
            return training_of_run(run, step)


def training_of_run(path: Path, step: int | None = None) -> Weights:
    """What a run goes on from: its parameters, the optimiser's moments, the step, the best loss and the settings.

    The parameters are those that were trained, even where the run keeps their moving average, which is what is sampled
    from: the moments are of the former, and training that went on from the average would not be the run's.

    Args:
        path: the run folder.
        step: of the checkpoint; None takes the newest intact one.

    Raises:
        ModelError: there is no such checkpoint, it is damaged, or the optimiser was not AdamW.
    """
    with Checkpoints(path / CHECKPOINTS_FOLDER) as checkpoints:
        optimizer = checkpoints.describe(step).get("train", {}).get("optimizer", "adamw")
        if optimizer != "adamw":
            raise ModelError(
                f"{path}: trained with optimizer={optimizer}, whose state goes on only in its own run"
                " (init_from=resume) or in another of the same optimizer, shape and layers:"
                " take its weights alone (init_state=weights, convert --weights-only)"
            )
        saved = checkpoints.read(lambda names: names[0] in _WANTED, step)
        config = run_model_config(path, saved.description)
    place = str(checkpoints.folder / str(saved.step))

    def arranged(tree: Mapping[str, Any], what: str) -> Tree:
        return params_from_named(flattened(tree), config, place=f"{place}: {what}")

    try:
        adam = saved.arrays[_ADAM[0]][_ADAM[1]]
        updates, first, second = int(adam["count"]), adam["mu"], adam["nu"]
        params = saved.arrays["params"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{place}: lacks {error} of the optimiser's state") from None
    moments = Moments(updates, arranged(first, "first moments"), arranged(second, "second moments"))
    settings = {
        key: bare_name(value) if key in _PATHS else value
        for key, value in saved.description.get("train", {}).items()
    }
    best = saved.description.get("patience", {}).get("best")
    return Weights(config, arranged(params, "parameters"), Training(saved.step, best, settings, moments))


def crop_training(weights: Weights, block_size: int, *, place: str) -> Weights:
    """The same model with a shorter context, and its moments likewise.

    Raises:
        ModelError: the model's context is shorter than that.
    """
    cropped = crop_block_size(weights, block_size, place=place)
    training = weights.training
    if training is None or training.moments is None:
        return replace(cropped, training=training)
    first, second = (
        crop_block_size(Weights(weights.config, tree), block_size, place=place).params
        for tree in (training.moments.first, training.moments.second)
    )
    moments = Moments(training.moments.updates, first, second)
    return replace(cropped, training=replace(training, moments=moments))


def moved_state(config: TrainConfig, steps: CompiledSteps, weights: Weights, *, place: str) -> TrainState:
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
