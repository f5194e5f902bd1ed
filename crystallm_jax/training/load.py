"""Weights from wherever they are: a published checkpoint, a model folder, or a run of this package."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from crystallm_jax.config import load_config
from crystallm_jax.convert.arrange import flattened, params_from_named
from crystallm_jax.convert.folder import WEIGHTS_FILE, read_folder
from crystallm_jax.convert.published import read_published
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.runfolder import CHECKPOINTS_FOLDER, CONFIG_FILE

DEFAULT_NAME = "default"
"""The name of the model in the package."""
DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / DEFAULT_NAME


def load_weights(path: str | Path) -> Weights:
    """Read a published `ckpt.pt`, a model folder, a run folder's newest checkpoint, one of them, or `default`.

    Raises:
        ModelError: nothing of the kind is there, or it is damaged.
    """
    path = DEFAULT_MODEL if str(path) == DEFAULT_NAME else Path(path)
    if path.is_file():
        return read_published(path)
    if (path / WEIGHTS_FILE).is_file():
        return read_folder(path)
    if (path / CHECKPOINTS_FOLDER).is_dir():
        return read_run(path)
    if path.parent.name == CHECKPOINTS_FOLDER and path.name.isdecimal() and path.is_dir():
        return read_run(path.parents[1], step=int(path.name))
    raise ModelError(
        f"{path}: no model there; expected a published ckpt.pt, a folder with {WEIGHTS_FILE}, or a run folder"
        f" with {CHECKPOINTS_FOLDER}/"
    )


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
    config = ModelConfig(**{**vars(weights.config), "block_size": block_size})
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
        averaged = float(description.get("train", {}).get("ema_decay", 0)) > 0
        root = "ema" if averaged else "params"
        saved = checkpoints.read(lambda names: names[0] == root, step)
    place = str(checkpoints.folder / str(saved.step))
    return Weights(config, params_from_named(flattened(saved.arrays[root]), config, place=place))


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
