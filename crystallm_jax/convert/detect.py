"""What kind of model a file or folder is, told by its content: names lie."""

import zipfile
from pathlib import Path
from typing import Literal

from crystallm_jax.convert.folder import is_folder
from crystallm_jax.errors import ModelError

# `published`: a PyTorch checkpoint; `archive`: a tar of one; `unknown` files are given to the reader of checkpoints,
# which says what is wrong.
FileKind = Literal["published", "numpy", "archive", "safetensors", "unknown"]
FolderKind = Literal["folder", "huggingface", "none"]

HUGGINGFACE_CONFIG = "config.json"
_ZIP, _GZIP, _TAR = b"PK\x03\x04", b"\x1f\x8b", (257, b"ustar")
_HEAD = 512


def kind_of_file(path: Path) -> FileKind:
    """What a file is.

    Raises:
        ModelError: it cannot be read.
    """
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


def _kind_of_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # Cut short: what it was can only be told from its name.
        return "numpy" if path.suffix == ".npz" else "published"
    if any(name.endswith(".npy") for name in names):
        return "numpy"
    return "published"


def kind_of_folder(path: Path) -> FolderKind:
    """What a folder is, as far as it can be told without its runs.

    Raises:
        ModelError: it may not be looked into.
    """
    try:
        if is_folder(path):
            return "folder"
        return "huggingface" if (path / HUGGINGFACE_CONFIG).is_file() else "none"
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def is_model(path: Path) -> bool:
    """Whether a model lies there, as a file or a folder; runs are none."""
    if path.is_file():
        return kind_of_file(path) in ("published", "numpy", "safetensors")
    return kind_of_folder(path) != "none"
