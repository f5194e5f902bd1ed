"""One run at a time in a run folder: two would remove each other's checkpoints."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from crystallm_jax.errors import ConfigError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def sole_run(out_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock ends with it, however it ends.

    Where the file system has no locks, or the folder cannot be written, nothing is held.

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
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def _locked(file: IO[str], out_dir: Path) -> bool:
    """Lock a file; False where the run that held it has removed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ConfigError(
            f"out_dir={out_dir}: a run is under way there ({holder}): wait for it, stop it, or choose another out_dir"
        ) from None
    path = out_dir / LOCK_FILE
    return path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
