"""Put a new folder in the place of an old one, so that a kill at any moment leaves one of the two there, whole."""

import ctypes
import os
import shutil
from pathlib import Path

from crystallm_jax.errors import ModelError

# Of Linux's renameat2, fcntl.h and fs.h: names are relative to the working folder; the two change places.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def swap_folder(new: Path, target: Path) -> None:
    """Put a copy of `new` in the place of `target`, which may not be there yet; `new` stays.

    Where the system cannot let two names change places at once, the old folder waits under another name for a moment,
    and `put_right` brings it back after a kill in this moment.

    Raises:
        ModelError: it cannot be written; what was there still is.
    """
    put_right(target)
    staged, old = _beside(target, "new"), _beside(target, "old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(new, staged)
        if not target.exists():
            staged.rename(target)
        elif not exchange(staged, target):
            target.rename(old)
            staged.rename(target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be replaced: {error.strerror or error}") from None
    finally:
        put_right(target)


def put_right(target: Path) -> None:
    """Remove what a swap that was killed has left beside `target`, once `target` is there."""
    staged, old = _beside(target, "new"), _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    for left in (staged, old):
        shutil.rmtree(left, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(one), os.fsencode(other))
    return rename is not None and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")
