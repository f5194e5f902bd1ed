"""Files and folders that appear when they are whole, under temporary names that are of this process alone."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crystallm_jax.errors import ModelError


def check_new(path: Path) -> None:
    """See that something may be put at `path`: nothing is there, or an empty folder.

    Raises:
        ModelError: something is there, or it cannot be told.
    """
    try:
        free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:  # a name that no file can have, or a folder that may not be looked into
        raise ModelError(f"{path}: cannot be written: {error.strerror}") from None
    if not free:
        raise ModelError(f"{path}: is there already: give another name, or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `path` once it is left; where filling it fails, nothing does.

    Raises:
        ModelError: something is at `path`, or it cannot be written.
    """
    # Of this process: another one may be writing the same, and its folder is not ours to remove.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        check_new(path)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The name of a file to write, which appears as `path` once it is left; where writing it fails, nothing does.

    A file that is at `path` is replaced.

    Raises:
        ModelError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        # It may never have come into being, its folder neither.
        with suppress(OSError):
            partial.unlink()
