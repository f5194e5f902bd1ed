"""The kinds of models, one table: how each is read, written, and what card it has; and reading any of them."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from crystallm_jax.artifacts import model_archives
from crystallm_jax.errors import ModelError
from crystallm_jax.models.card import ModelCard, read_card
from crystallm_jax.models.detect import Kind, kind_of
from crystallm_jax.models.huggingface import read_huggingface, write_huggingface
from crystallm_jax.models.locate import DEFAULT_NAME, locate, read_archive
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import (
    WEIGHTS_FILE,
    Storage,
    check_new,
    read_folder,
    read_folder_training,
    write_folder,
)
from crystallm_jax.models.npz import StoredType, read_npz, write_npz
from crystallm_jax.models.provenance import card_of_run
from crystallm_jax.models.published import read_published, read_published_training, write_published
from crystallm_jax.models.runs import keeps_average, read_run, read_run_training
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, CONFIG_FILE

Written = Literal["folder", "published", "numpy", "huggingface"]
_BY_SUFFIX: dict[str, Written] = {".pt": "published", ".pth": "published", ".npz": "numpy"}


@dataclass(frozen=True)
class WriteSettings:
    """How a model is written.

    Attributes:
        card: what is known of it; kinds without a card leave it out.
        dtype: of the parameters as they are stored.
        storage: of a model folder's parameters.
    """

    card: ModelCard
    dtype: StoredType = "float32"
    storage: Storage = "safetensors"


@dataclass(frozen=True)
class _Format:
    """A kind of model.

    Attributes:
        read: its parameters.
        read_training: these, with what its training needs to go on; without that where the kind has no place for it.
        card: what is known of one.
        write: into a file or folder that is not there yet; None for kinds that are not written.
        dtypes: that the parameters may be stored as.
    """

    read: Callable[[Path], Model]
    read_training: Callable[[Path], Model]
    card: Callable[[Path], ModelCard] = lambda _: ModelCard()
    write: Callable[[Path, Model, WriteSettings], None] | None = None
    dtypes: tuple[StoredType, ...] = ("float32", "float16", "bfloat16")


def read_model(path_or_name: str | Path) -> Model:
    """Read a model: a file or folder of any kind, a run's newest checkpoint or one of them, or one that is named.

    Raises:
        CrystallmError: nothing of the kind is there, or it is damaged.
    """
    path = locate(path_or_name)
    return _KINDS[_known_kind(path)].read(path)


def read_training(path_or_name: str | Path) -> Model:
    """Read a model with all that its training needs to go on; kinds that have no place for it are read without.

    Raises:
        CrystallmError: nothing of the kind is there, or it is damaged.
    """
    path = locate(path_or_name)
    return _KINDS[_known_kind(path)].read_training(path)


def card_of(path: Path) -> ModelCard:
    """The card of a model folder, or one made of what a run says of itself; an empty one of other kinds.

    Raises:
        CrystallmError: a card or configuration that cannot be read.
    """
    return _KINDS[_known_kind(path)].card(path)


def kind_to_write(target: Path) -> Written:
    """The kind that a name asks for: `.pt` a published checkpoint, `.npz` NumPy's, any other a model folder."""
    return _BY_SUFFIX.get(target.suffix.lower(), "folder")


def read_to_write(source: Path, *, kind: Written, weights_only: bool) -> Model:
    """Read what goes into a kind: the optimiser's moments too where it holds them and they are wanted.

    A run that keeps a moving average of its weights gives that, without moments, to whoever samples from it, and what
    it trains on, with them, to whoever goes on training with the published code.

    Raises:
        CrystallmError: there is no such model, or it is damaged.
    """
    if weights_only or kind in ("numpy", "huggingface") or (kind == "folder" and keeps_average(source)):
        return read_model(source)
    return read_training(source)


def write_model(target: Path, model: Model, *, kind: Written, settings: WriteSettings) -> None:
    """Write a model; what is written appears under its name when it is complete.

    Args:
        target: a file or folder that is not there yet.
        model: with the moments of its training where they are to go along.
        kind: of what is written.
        settings: how.

    Raises:
        ModelError: the target is there already, cannot be written, or its kind has no such `dtype`.
    """
    check_new(target)
    form = _KINDS[kind]
    if settings.dtype not in form.dtypes:
        held = (
            "only NumPy files (.npz) hold it"
            if settings.dtype == "int8"
            else "published checkpoints hold float32 alone"
        )
        raise ModelError(f"{target}: dtype={settings.dtype}: {held}")
    if form.write is not None:
        form.write(target, model, settings)


def _known_kind(path: Path) -> Kind:
    kind = kind_of(path)
    if kind is None:
        close = difflib.get_close_matches(str(path), (DEFAULT_NAME, *model_archives()), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(
            f"{path}: no model there; expected a file (ckpt.pt, model.npz), a folder with {WEIGHTS_FILE}, a run folder"
            f" with {CHECKPOINTS_FOLDER}/, or a name: {DEFAULT_NAME}, hf:OWNER/NAME, or one that"
            f" `crystallm download --list` shows{hint}"
        )
    return kind


def _refuse_bare_tensors(path: Path) -> Model:
    raise ModelError(f"{path}: tensors alone: give the folder that holds them with their {CONFIG_FILE}")


def _write_folder(target: Path, model: Model, settings: WriteSettings) -> None:
    card, dtype = replace(settings.card, files={}), settings.dtype
    write_folder(target, model, card=card, dtype=dtype, storage=settings.storage)  # type: ignore[arg-type]  # checked


def _write_huggingface(target: Path, model: Model, settings: WriteSettings) -> None:
    card = replace(settings.card, files={}).to_markdown()
    write_huggingface(target, model, card=card, dtype=settings.dtype)  # type: ignore[arg-type]  # checked


_KINDS: dict[Kind, _Format] = {
    "folder": _Format(read_folder, read_folder_training, read_card, _write_folder),
    "huggingface": _Format(read_huggingface, read_huggingface, write=_write_huggingface),
    "numpy": _Format(
        read_npz,
        read_npz,
        write=lambda target, model, settings: write_npz(target, model, dtype=settings.dtype),
        dtypes=("float32", "float16", "bfloat16", "int8"),
    ),
    "published": _Format(
        read_published,
        read_published_training,
        write=lambda target, model, _: write_published(target, model),
        dtypes=("float32",),
    ),
    # Its reader says what is wrong with it.
    "unknown": _Format(read_published, read_published_training),
    "archive": _Format(read_archive, partial(read_archive, read=read_published_training)),
    "safetensors": _Format(_refuse_bare_tensors, _refuse_bare_tensors),
    "run": _Format(read_run, read_run_training, card_of_run),
    "checkpoint": _Format(read_run, read_run_training, card_of_run),
}
