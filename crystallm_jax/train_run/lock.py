"""One run at a time in a run folder: two would remove each other's checkpoints."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from crystallm_jax.errors import ConfigError
from crystallm_jax.files import holder_of, lock, remove_leftovers, sign

LOCK_FILE = ".lock"


@contextlib.contextmanager
def sole_run(out_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock ends with it, however it ends.

    What a killed run left half written is removed. Where the file system has no locks, or the folder cannot be
    written, nothing is held.

    Raises:
        ConfigError: another run holds it.
    """
    path = out_dir / LOCK_FILE
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(path.open("a+"))
            while not _locked(file, out_dir):
                file = stack.enter_context(path.open("a+"))
            # While it is held: nobody else's is removed.
            stack.callback(path.unlink, missing_ok=True)
            sign(file)
            remove_leftovers(out_dir)
        yield


def _locked(file: IO[str], out_dir: Path) -> bool:
    """Lock a file; False where the run that held it has removed it meanwhile."""
    if not lock(file):
        raise ConfigError(
            f"out_dir={out_dir}: a run is under way there ({holder_of(file)}): wait for it, stop it, or choose another"
            " out_dir"
        )
    path = out_dir / LOCK_FILE
    return path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
