"""Weights from wherever they are: files and folders of every format, and runs."""

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from crystallm_jax.artifacts import model_archives
from crystallm_jax.config import load_config
from crystallm_jax.convert.arrange import flattened, params_from_named
from crystallm_jax.convert.detect import kind_of_file, kind_of_folder
from crystallm_jax.convert.folder import WEIGHTS_FILE, read_folder
from crystallm_jax.convert.huggingface import read_huggingface
from crystallm_jax.convert.npz import read_npz
from crystallm_jax.convert.published import read_published
from crystallm_jax.convert.sources import DEFAULT_NAME, locate, read_archive
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.runfolder import CHECKPOINTS_FOLDER, CONFIG_FILE, is_checkpoint


def load_weights(path_or_name: str | Path) -> Weights:
    """Read a model: a file or folder of any format, a run's newest checkpoint or one of them, or one that is named.

    Raises:
        CrystallmError: nothing of the kind is there, or it is damaged.
    """
    path = locate(path_or_name)
    if path.is_file():
        return _read_file(path)
    match kind_of_folder(path):
        case "folder":
            return read_folder(path)
        case "huggingface":
            return read_huggingface(path)
    run, step = run_of(path)
    return read_run(run, step)


def _read_file(path: Path) -> Weights:
    match kind_of_file(path):
        case "numpy":
            return read_npz(path)
        case "archive":
            return read_archive(path)
        case "safetensors":
            raise ModelError(
                f"{path}: tensors alone: give the folder that holds them with their {CONFIG_FILE}"
            )
    return read_published(path)


class RunPath(NamedTuple):
    """A run folder, and the step of one of its checkpoints; None for the newest intact one."""

    folder: Path
    step: int | None


def run_of(path: Path) -> RunPath:
    """The run that a path names: its folder, or one of its checkpoints.

    Raises:
        ModelError: it names none.
    """
    if (path / CHECKPOINTS_FOLDER).is_dir():
        return RunPath(path, None)
    if is_checkpoint(path):
        return RunPath(path.parents[1], int(path.name))
    raise ModelError(
        f"{path}: no model there; expected a file (ckpt.pt, model.npz), a folder with {WEIGHTS_FILE}, a run folder"
        f" with {CHECKPOINTS_FOLDER}/, or a name: {DEFAULT_NAME}, hf:OWNER/NAME, or one that"
        f" `crystallm download --list` shows{_hint(path)}"
    )


def found_run(path: Path) -> RunPath | None:
    """The run that a path names; None where a model of another kind lies there.

    Raises:
        ModelError: nothing of the kind is there.
    """
    return None if path.is_file() or kind_of_folder(path) != "none" else run_of(path)


def _hint(path: Path) -> str:
    close = difflib.get_close_matches(str(path), (DEFAULT_NAME, *model_archives()), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def crop_block_size(weights: Weights, block_size: int, *, place: str) -> Weights:
    """The same model with a shorter context: position embeddings beyond it are dropped, as published.

    Raises:
        ModelError: the model's context is shorter than that.
    """
    if block_size > weights.config.block_size:
        raise ModelError(
            f"{place}: its context is {weights.config.block_size} tokens; block_size={block_size} would need"
            " positions that it never learned"
        )
    table = weights.params["wpe"]["embedding"][:block_size]
    config = replace(weights.config, block_size=block_size)
    return Weights(config, {**weights.params, "wpe": {"embedding": table}})


def read_run(path: Path, step: int | None = None) -> Weights:
    """The weights that a run exports: their moving average where it keeps one.

    Whatever mesh and layout it was trained in, by this version or an earlier one.

    Args:
        path: the run folder.
        step: of the checkpoint; None takes the newest intact one.

    Raises:
        ModelError: there is no such checkpoint, or it is damaged.
    """
    with Checkpoints(path / CHECKPOINTS_FOLDER) as checkpoints:
        description = checkpoints.describe(step)
        config = run_model_config(path, description)
        root = "ema" if _is_averaged(description) else "params"
        saved = checkpoints.read(lambda names: names[0] == root, step)
    place = str(checkpoints.folder / str(saved.step))
    named = flattened(saved.arrays.get(root, {}))
    return Weights(config, params_from_named(named, config, place=place))


def keeps_average(path: Path) -> bool:
    """Whether this is a run, or a checkpoint of one, that keeps a moving average of its weights.

    Raises:
        ModelError: it is a run without an intact checkpoint.
    """
    found = found_run(path)
    if found is None:
        return False
    with Checkpoints(found.folder / CHECKPOINTS_FOLDER) as checkpoints:
        return _is_averaged(checkpoints.describe(found.step))


def _is_averaged(description: Mapping[str, Any]) -> bool:
    return float(description.get("train", {}).get("ema_decay", 0)) > 0


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
