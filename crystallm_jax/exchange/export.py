"""From any model to any format."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from crystallm_jax.convert.card import ModelCard
from crystallm_jax.convert.folder import FloatType, Storage, check_new, write_folder
from crystallm_jax.convert.huggingface import write_huggingface
from crystallm_jax.convert.npz import Storage as StoredType
from crystallm_jax.convert.npz import write_npz
from crystallm_jax.convert.published import write_published
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ModelError
from crystallm_jax.training.load import keeps_average, load_weights
from crystallm_jax.training.moments import load_training

Format = Literal["folder", "published", "numpy", "huggingface"]
_BY_SUFFIX: dict[str, Format] = {".pt": "published", ".pth": "published", ".npz": "numpy"}


def format_of(target: Path) -> Format:
    """The format that a name asks for: `.pt` a published checkpoint, `.npz` NumPy's, any other a model folder."""
    return _BY_SUFFIX.get(target.suffix.lower(), "folder")


def gathered(source: Path, *, form: Format, weights_only: bool) -> Weights:
    """Read what goes into a format: the optimiser's moments too where it holds them and they are wanted.

    A run that keeps a moving average of its weights gives that, without moments, to whoever samples from it, and what
    it trains on, with them, to whoever goes on training with the published code.

    Raises:
        CrystallmError: there is no such model, or it is damaged.
    """
    if weights_only or form in ("numpy", "huggingface") or (form == "folder" and keeps_average(source)):
        return load_weights(source)
    return load_training(source)


def export(
    weights: Weights,
    target: Path,
    *,
    form: Format,
    card: ModelCard,
    dtype: StoredType = "float32",
    storage: Storage = "safetensors",
) -> None:
    """Write a model; what is written appears under its name when it is complete.

    Args:
        weights: the model, with the moments of its training where they are to go along.
        target: a file or folder that is not there yet.
        form: the format.
        card: what is known of the model; formats without a card leave it out.
        dtype: of the parameters as they are stored.
        storage: of a model folder's parameters.

    Raises:
        ModelError: the target is there already, cannot be written, or its format has no such `dtype`.
    """
    check_new(target)
    if form == "numpy":
        write_npz(target, weights, dtype=dtype)
        return
    float_type = _float_type(dtype, target)
    match form:
        case "published":
            if float_type != "float32":
                raise ModelError(f"{target}: dtype={dtype}: published checkpoints hold float32 alone")
            write_published(target, weights)
        case "huggingface":
            write_huggingface(target, weights, card=replace(card, files={}).to_markdown(), dtype=float_type)
        case "folder":
            write_folder(target, weights, card=replace(card, files={}), dtype=float_type, storage=storage)


def _float_type(dtype: StoredType, target: Path) -> FloatType:
    if dtype == "int8":
        raise ModelError(f"{target}: dtype=int8: only NumPy files (.npz) hold it")
    return dtype
