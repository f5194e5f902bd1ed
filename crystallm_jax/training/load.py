"""Weights from wherever they are: a published checkpoint, a model folder, or a run of this package."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from crystallm_jax.config import load_config
from crystallm_jax.convert.folder import WEIGHTS_FILE, read_folder
from crystallm_jax.convert.published import read_published
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.model.layout import unstacked
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.runfolder import CHECKPOINTS_FOLDER, CONFIG_FILE
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps

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
        return _read_run(path)
    if path.parent.name == CHECKPOINTS_FOLDER and path.name.isdecimal() and path.is_dir():
        return _read_run(path.parents[1], step=int(path.name))
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


def _read_run(path: Path, step: int | None = None) -> Weights:
    config = load_config(TrainConfig, path / CONFIG_FILE)
    with Checkpoints(path / CHECKPOINTS_FOLDER) as checkpoints:
        vocab_size = int(checkpoints.describe(step)["vocab_size"])
        model_config = config.model_config(vocab_size)
        # Whatever mesh it was trained on, it is read onto one device, of this process where there are several.
        one_device = make_mesh(1, 1, jax.local_devices()[:1])
        steps = compile_steps(config, model_config, one_device)
        state = checkpoints.restore(steps.abstract, step).state
    params = jax.tree.map(np.asarray, unstacked(state.exported))
    return Weights(replace(model_config, layers="unrolled", remat="none"), params)
