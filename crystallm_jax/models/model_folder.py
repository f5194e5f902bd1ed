"""A model as a folder that travels.

    config.yaml             the shape
    vocab.json              the tokens, a list in the order of their ids
    model.safetensors       the parameters by name (`h_0.attn.c_attn.kernel`), matrices and vectors; or
    params/                 the same numbers as an orbax checkpoint, nested, for readers that load it sharded
    optimizer.safetensors   the optimiser's moments, `first.NAME` and `second.NAME`; where they were kept
    training.json           where training stands: step, best validation loss, settings; where it is known
    MODEL_CARD.md           data, licence, command, metrics, and the hashes of the files above

Folders of format 1 had the first, the third and the last, without hashes; they are read as ever.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.config import load_config, to_yaml
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.files import is_free, new_folder, write_errors
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.card import CARD_FILE, FOLDER_FORMAT, ModelCard, damage_of, read_card, with_hashes
from crystallm_jax.models.model import Model, Moments, Training
from crystallm_jax.models.parameters import flattened, named_arrays, nested, params_from_named
from crystallm_jax.models.published_optimizer import read_count
from crystallm_jax.models.tensors import read_tensors, write_tensors
from crystallm_jax.models.tokens import check_tokens

WEIGHTS_FILE = "model.safetensors"
PARAMS_FOLDER = "params"
CONFIG_FILE = "config.yaml"
VOCABULARY_FILE = "vocab.json"
MOMENTS_FILE = "optimizer.safetensors"
TRAINING_FILE = "training.json"
# What stands before the names in the file of moments.
_MOMENTS = ("first", "second")
Storage = Literal["safetensors", "orbax"]
FloatType = Literal["float32", "float16", "bfloat16"]


def check_new(path: Path) -> None:
    """See that something may be put at `path`: nothing is there, or an empty folder.

    Raises:
        ModelError: something is there, or it cannot be told.
    """
    # A name that no file can have, or a folder that may not be looked into, is no place either.
    with write_errors(path, ModelError):
        free = is_free(path)
    if not free:
        raise ModelError(f"{path}: is there already: give another name, or remove it")


def is_folder(path: Path) -> bool:
    """Whether a model folder lies there."""
    return (path / CONFIG_FILE).is_file() and (
        (path / WEIGHTS_FILE).is_file() or (path / PARAMS_FOLDER).is_dir()
    )


def read_folder(path: str | Path) -> Model:
    """Read a model folder without the optimiser's moments; every tensor is checked by name, shape and hash.

    Raises:
        ModelError: a file is missing or damaged, or a tensor is missing, left over or of another shape.
    """
    path = Path(path)
    try:
        config = load_config(ModelConfig, path / CONFIG_FILE)
    except ConfigError as error:  # the command line was right
        told, file = str(error), str(path / CONFIG_FILE)
        raise ModelError(told if file in told else f"{file}: {told}") from None
    card = read_card(path)
    if card.format > FOLDER_FORMAT:
        raise ModelError(
            f"{path}: a folder of format {card.format}; this version reads up to {FOLDER_FORMAT}: install a newer one"
        )
    _check_vocabulary(path, config)
    for name in card.files:
        if name == WEIGHTS_FILE or name.startswith(f"{PARAMS_FOLDER}/"):
            _check_hash(path, card, name)
    if (path / PARAMS_FOLDER).is_dir() and not (path / WEIGHTS_FILE).exists():
        from crystallm_jax.models.orbax_arrays import read_params  # noqa: PLC0415  JAX, for these folders alone

        place = path / PARAMS_FOLDER
        named = flattened(read_params(place))
    else:
        place = path / WEIGHTS_FILE
        named = read_tensors(place)
    params = params_from_named(named, config, place=str(place))
    return Model(config, params, _training(path))


def read_folder_training(path: str | Path) -> Model:
    """Read a model folder, the optimiser's moments with it where it keeps them.

    Raises:
        ModelError: a file is missing or damaged, or a tensor is missing, left over or of another shape.
    """
    path = Path(path)
    weights = read_folder(path)
    if weights.training is None or not (path / MOMENTS_FILE).is_file():
        return weights
    _check_hash(path, read_card(path), MOMENTS_FILE)
    tensors = read_tensors(path / MOMENTS_FILE)
    parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in _MOMENTS}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise ModelError(f"{path / MOMENTS_FILE}: tensor {name} is of no moments: get another copy")
        parts[part][rest] = value
    first, second = (
        params_from_named(parts[part], weights.config, place=f"{path / MOMENTS_FILE}: {part} moments")
        for part in _MOMENTS
    )
    moments = Moments(_updates(path, weights.training), first, second)
    return replace(weights, training=replace(weights.training, moments=moments))


def write_folder(
    path: str | Path,
    weights: Model,
    *,
    card: ModelCard | None = None,
    dtype: FloatType = "float32",
    storage: Storage = "safetensors",
) -> ModelCard:
    """Write a model folder; it appears under its name when it is complete.

    Args:
        path: the folder, which must not be there yet, or be empty.
        weights: the model; the moments of its training are kept, in float32.
        card: what is known of it; the number of parameters and the hashes are filled in.
        dtype: of the parameters in the file.
        storage: of the parameters.

    Returns:
        The card as it was written.

    Raises:
        ModelError: the folder is there already, or cannot be written.
    """
    path = Path(path)
    named = named_arrays(weights.params, weights.config)
    count = sum(value.size for value in named.values())
    check_new(path)
    with new_folder(path, ModelError) as partial:
        _write_params(partial, named, dtype=dtype, storage=storage)
        (partial / CONFIG_FILE).write_text(to_yaml(weights.config), encoding="utf-8")
        if weights.config.vocab_size == len(TOKENS):
            (partial / VOCABULARY_FILE).write_text(json.dumps(TOKENS) + "\n", encoding="utf-8")
        if weights.training is not None:
            _write_training(partial, weights.training, weights.config)
        card = with_hashes(replace(card or ModelCard(), parameters=count), partial)
        (partial / CARD_FILE).write_text(card.to_markdown(), encoding="utf-8")
    return card


def _write_params(
    folder: Path, named: Mapping[str, np.ndarray], *, dtype: FloatType, storage: Storage
) -> None:
    stored = {name: np.ascontiguousarray(value, dtype) for name, value in named.items()}
    if storage == "orbax":
        from crystallm_jax.models.orbax_arrays import write_params  # noqa: PLC0415  JAX, for these folders alone

        write_params(folder / PARAMS_FOLDER, nested(stored))
    else:
        write_tensors(folder / WEIGHTS_FILE, stored)


def _write_training(folder: Path, training: Training, config: ModelConfig) -> None:
    state: dict[str, Any] = {"step": training.step, "settings": training.settings}
    if training.best_val_loss is not None and math.isfinite(training.best_val_loss):
        state["best_val_loss"] = training.best_val_loss
    if training.moments is not None:
        state["updates"] = training.moments.updates
        trees = dict(zip(_MOMENTS, (training.moments.first, training.moments.second), strict=True))
        write_tensors(folder / MOMENTS_FILE, dict(_prefixed(trees, config)))
    (folder / TRAINING_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _prefixed(trees: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    for part, tree in trees.items():
        for name, value in named_arrays(tree, config).items():
            yield f"{part}.{name}", np.ascontiguousarray(value, np.float32)


def _check_hash(path: Path, card: ModelCard, name: str) -> None:
    if damage := damage_of(path, card, name):
        raise ModelError(f"{path}: damaged or changed since it was written: {damage}: get another copy")


def _check_vocabulary(path: Path, config: ModelConfig) -> None:
    file = path / VOCABULARY_FILE
    if not file.exists():
        return
    if not file.is_file():  # such as a pipe, which would be waited for
        raise ModelError(f"{file}: cannot be read: no plain file")
    try:
        tokens = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tokens, list) or len(tokens) != config.vocab_size:
        raise ModelError(f"{file}: not a list of the {config.vocab_size} tokens that {CONFIG_FILE} asks for")
    check_tokens(tokens, place=str(file))


def _training(path: Path) -> Training | None:
    if not (path / TRAINING_FILE).is_file():
        return None
    with _saved_training(path) as saved:
        step, best, settings = saved["step"], saved.get("best_val_loss"), dict(saved.get("settings") or {})
        best = None if best is None else float(best)
    return Training(read_count(step, f"{path / TRAINING_FILE}: its step"), best, settings)


def _updates(path: Path, training: Training) -> int:
    with _saved_training(path) as saved:
        updates = saved.get("updates", training.step)
    return read_count(updates, f"{path / TRAINING_FILE}: its count of updates")


@contextmanager
def _saved_training(path: Path) -> Iterator[Any]:
    """What the file says of the training; what goes wrong with it inside the block is the file's fault.

    Raises:
        ModelError: it cannot be read, or says something else.
    """
    file = path / TRAINING_FILE
    try:
        yield json.loads(file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
