"""What kind of model a file or folder is, told by its content: names lie."""

import zipfile
from pathlib import Path
from typing import Literal

from crystallm_jax.errors import ModelError
from crystallm_jax.models.model_folder import is_folder
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, is_checkpoint

# `published`: a PyTorch checkpoint; `archive`: a tar of one; `safetensors`: tensors without their configuration;
# `unknown`: a file of another kind; `checkpoint`: one of a run's.
Kind = Literal[
    "published", "numpy", "archive", "safetensors", "unknown", "folder", "huggingface", "run", "checkpoint"
]

HUGGINGFACE_CONFIG = "config.json"
_ZIP, _GZIP, _TAR = b"PK\x03\x04", b"\x1f\x8b", (257, b"ustar")
_HEAD = 512


def kind_of(path: Path) -> Kind | None:
    """What lies there; None for a folder that holds no model, and where there is nothing.

    Raises:
        ModelError: it cannot be looked into.
    """
    try:
        if path.is_file():
            return _kind_of_file(path)
        if is_folder(path):
            return "folder"
        if (path / HUGGINGFACE_CONFIG).is_file():
            return "huggingface"
        if (path / CHECKPOINTS_FOLDER).is_dir():
            return "run"
        return "checkpoint" if is_checkpoint(path) else None
    except OSError as error:  # a name that no file can have, or a folder that may not be looked into
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _kind_of_file(path: Path) -> Kind:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    place, magic = _TAR
    if head.startswith(_GZIP) or head[place : place + len(magic)] == magic:
        return "archive"
    if head.startswith(_ZIP):
        return _kind_of_zip(path)
    # Eight bytes of length, then JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    return "unknown"


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # Cut short: what it was can only be told from its name.
        return "numpy" if path.suffix == ".npz" else "published"
    if any(name.endswith(".npy") for name in names):
        return "numpy"
    return "published"


def is_model(path: Path) -> bool:
    """Whether a model lies there, or one of a run's checkpoints; runs themselves and archives count as none.

    Raises:
        ModelError: it cannot be looked into.
    """
    return kind_of(path) in ("published", "numpy", "safetensors", "folder", "huggingface", "checkpoint")
