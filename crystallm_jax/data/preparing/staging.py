"""Files of one folder under temporary names, until all of them are there."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

from crystallm_jax.errors import DataError
from crystallm_jax.files import sync, temporary_name


class Staging:
    """Gives a folder its files all at once; a context manager that leaves nothing behind unless it published.

    Args:
        folder: made when missing; removed again when nothing was published and nobody else put something there.
        work: where the files lie until then, a folder on the same disk; None for `folder` itself.
    """

    def __init__(self, folder: str | Path, work: Path | None = None) -> None:
        self.folder = Path(folder)
        self._work = self.folder if work is None else work
        self._temporary: dict[Path, Path] = {}
        self._open_files = contextlib.ExitStack()
        self._made: list[Path] = []
        with writing(self.folder):
            self._made = make_folder(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(
            OSError
        ):  # a full disk fails this flush too; its error is on its way already
            self._open_files.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)
        remove_empty(self._made)

    def binary(self, name: str) -> BinaryIO:
        """A file to write bytes to, which gets its name when all is published."""
        with writing(self.folder):
            return self._open_files.enter_context(self._named(name).open("wb"))

    def text(self, name: str) -> TextIO:
        """A file to write text to, with line ends as they are given."""
        with writing(self.folder):
            return self._open_files.enter_context(self._named(name).open("w", encoding="utf-8", newline=""))

    def publish(self, remove: tuple[str, ...] = ()) -> None:
        """Give the files their names in the order in which they were opened, then remove files of an earlier run.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        with writing(self.folder):
            self._open_files.close()
            for path in self._temporary:
                sync(path)
            for path, final in self._temporary.items():
                path.replace(final)
            self._temporary = {}
            self._made = []
            for name in remove:
                (self.folder / name).unlink(missing_ok=True)

    def _named(self, name: str) -> Path:
        path = temporary_name(self._work / name)
        self._temporary[path] = self.folder / name
        return path


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, from the first on, as long as they are empty."""
    for path in folders:
        with contextlib.suppress(OSError):  # not empty: someone else put something there
            path.rmdir()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with writing to a folder into one line.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        reason = error.strerror or str(error)
        raise DataError(
            f"{folder} cannot be written ({reason}; {free >> 20:,} MiB free): give another --out"
        ) from error
