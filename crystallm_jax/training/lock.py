"""One run at a time in a run folder: two would remove each other's checkpoints."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from os import getpid
from pathlib import Path

from crystallm_jax.errors import ConfigError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def sole_run(out_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock ends with it, however it ends, and its file stays.

    Where the file system has no locks, or the folder cannot be written, nothing is held.

    Raises:
        ConfigError: another run holds it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context((out_dir / LOCK_FILE).open("a+"))
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise ConfigError(
                        f"out_dir={out_dir}: a run is under way there ({holder}): wait for it, stop it, or choose"
                        " another out_dir"
                    ) from None
                raise
            file.truncate(0)
            file.write(f"process {getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
