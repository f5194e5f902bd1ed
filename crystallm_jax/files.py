"""Files and folders that get their names when they are whole; digests of files, and locks on them.

Until then they lie beside their place as `.NAME.TOKEN.partial`. A kill leaves that there, and at the place what was
there before. The token is drawn, as processes of several machines, whose numbers may be the same, write into one
folder. Permissions are those of any new file.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from crystallm_jax.errors import CrystallmError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


@contextmanager
def new_file(
    path: Path, kind: type[CrystallmError] | None = None, *, mend: str = "", synced: bool = True
) -> Iterator[Path]:
    """The name of a file to write, which appears as `path` once it is left; where writing it fails, nothing does.

    A file that is at `path` is replaced; folders above it are made.

    Args:
        path: the place.
        kind: of the error where it cannot be written; None for the system's.
        mend: what stands behind the reason in that.
        synced: have it on the disk first, so that a power failure leaves no empty file either. False for what is
            written by the thousand and can be made again.

    Raises:
        CrystallmError: it cannot be written; an OSError without a `kind`.
    """
    partial = temporary_name(path)
    try:
        with write_errors(path, kind, mend=mend):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if synced:
                sync(partial)
            partial.replace(path)
    finally:
        # It may never have come into being, its folder neither.
        with suppress(OSError):
            partial.unlink()


@contextmanager
def new_folder(path: Path, kind: type[CrystallmError] | None = None) -> Iterator[Path]:
    """A folder to fill, which appears as `path` once it is left; where filling it fails, nothing does.

    Raises:
        CrystallmError: something is at `path` by then, or it cannot be written; an OSError without a `kind`.
    """
    with write_errors(path, kind), scratch_folder(path) as partial:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        partial.replace(path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, which is removed with what is left in it.

    Raises:
        OSError: it cannot be made.
    """
    partial = temporary_name(path)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def write_errors(path: Path, kind: type[CrystallmError] | None, *, mend: str = "") -> Iterator[None]:
    """Turn what goes wrong with writing `path` into one line.

    Raises:
        CrystallmError: of this kind, with the mend behind the reason; without a kind the OSError as it is.
    """
    try:
        yield
    except OSError as error:
        if kind is None:
            raise
        raise kind(f"{path}: cannot be written: {error.strerror or error}{mend}") from None


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def remove_leftovers(folder: Path) -> None:
    """Remove files under temporary names from a folder that this process alone writes to: kills have left them."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_free(path: Path) -> bool:
    """Whether something may be put there: nothing is, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file's bytes, in hexadecimal; it finds damage and protects no secret."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def lock(file: IO[str] | IO[bytes], *, wait: bool = False) -> bool:
    """Hold an open file for this process, until it is closed; False where another one holds it.

    Args:
        file: what is open.
        wait: until the other lets go of it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def sign(file: IO[str]) -> None:
    """Write into a file that is held who holds it."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def holder_of(file: IO[str]) -> str:
    """Who holds a file, as its holder has signed it."""
    file.seek(0)
    return file.read().strip() or "another process"
