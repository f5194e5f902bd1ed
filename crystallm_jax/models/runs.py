"""Models out of training runs: what a run exports, and what its training goes on from."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from crystallm_jax.config import load_config
from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.checkpoints import SavedCheckpoints
from crystallm_jax.models.locate import bare_name
from crystallm_jax.models.model import Model, Moments, Training, Tree
from crystallm_jax.models.parameters import flattened, params_from_named
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, CONFIG_FILE, is_checkpoint
from crystallm_jax.train_run.train_config import TrainConfig

# Where optax's Adam keeps its state in the optimiser's: what has moments comes first.
_ADAM = ("opt_state", "0")
# Settings that are places on the machine that trained.
_PATHS = ("out_dir", "dataset", "init_from")
_WANTED = ("params", "opt_state")


class RunPath(NamedTuple):
    """A run folder, and the step of one of its checkpoints; None for the newest intact one."""

    folder: Path
    step: int | None


def run_of(path: Path) -> RunPath | None:
    """The run that a path names, by its folder or one of its checkpoints; None where it names none."""
    if (path / CHECKPOINTS_FOLDER).is_dir():
        return RunPath(path, None)
    return RunPath(path.parents[1], int(path.name)) if is_checkpoint(path) else None


def read_run(path: Path) -> Model:
    """The weights that a run exports: their moving average where it keeps one.

    Of any mesh and layout that it was trained in, by this version or an earlier one.

    Args:
        path: the run folder, of which the newest intact checkpoint is read, or one of its checkpoints.

    Raises:
        ModelError: there is no such checkpoint, or it is damaged.
    """
    run = _named(path)
    checkpoints = SavedCheckpoints(run.folder / CHECKPOINTS_FOLDER)
    description = checkpoints.describe(run.step)
    config = run_model_config(run.folder, description)
    root = "ema" if _is_averaged(description) else "params"
    saved = checkpoints.read(lambda names: names[0] == root, run.step)
    place = str(checkpoints.folder / str(saved.step))
    named = flattened(saved.arrays.get(root, {}))
    return Model(config, params_from_named(named, config, place=place))


def keeps_average(path: Path) -> bool:
    """Whether this is a run, or a checkpoint of one, that keeps a moving average of its weights.

    Raises:
        ModelError: it is a run without an intact checkpoint.
    """
    run = run_of(path)
    if run is None:
        return False
    return _is_averaged(SavedCheckpoints(run.folder / CHECKPOINTS_FOLDER).describe(run.step))


def read_run_training(path: Path) -> Model:
    """What a run goes on from: its parameters, the optimiser's moments, the step, the best loss and the settings.

    The parameters are those that were trained, even where the run keeps their moving average, which is what is sampled
    from: the moments are of the former, and training that went on from the average would not be the run's.

    Args:
        path: the run folder, of which the newest intact checkpoint is read, or one of its checkpoints.

    Raises:
        ModelError: there is no such checkpoint, it is damaged, or the optimiser was not AdamW.
    """
    run = _named(path)
    checkpoints = SavedCheckpoints(run.folder / CHECKPOINTS_FOLDER)
    optimizer = checkpoints.describe(run.step).get("train", {}).get("optimizer", "adamw")
    if optimizer != "adamw":
        raise ModelError(
            f"{path}: trained with optimizer={optimizer}, whose state goes on only in its own run"
            " (init_from=resume) or in another of the same optimizer, shape and layers:"
            " take its weights alone (init_state=weights, convert --weights-only)"
        )
    saved = checkpoints.read(lambda names: names[0] in _WANTED, run.step)
    config = run_model_config(run.folder, saved.description)
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
    return Model(config, arranged(params, "parameters"), Training(saved.step, best, settings, moments))


def run_model_config(path: Path, description: Mapping[str, Any]) -> ModelConfig:
    """The shape that a checkpoint of a run was saved with, as models are kept: a layer after the other.

    Args:
        path: the run folder, whose configuration says it where the checkpoint does not.
        description: of the checkpoint.

    Raises:
        ConfigError: the run's configuration cannot be read.
    """
    if "model" in description:
        known = {field.name for field in fields(ModelConfig)}
        config = ModelConfig(**{key: value for key, value in description["model"].items() if key in known})
    else:
        settings = load_config(TrainConfig, path / CONFIG_FILE)
        config = settings.model_config(int(description["vocab_size"]))
    return replace(config, layers="unrolled", remat="none")


def _named(path: Path) -> RunPath:
    run = run_of(path)
    if run is None:
        raise ModelError(f"{path}: neither a run folder nor a checkpoint of one")
    return run


def _is_averaged(description: Mapping[str, Any]) -> bool:
    return float(description.get("train", {}).get("ema_decay", 0)) > 0
