"""The inputs of a preparation: several groups of files, read one after another as one stream of records."""

import bisect
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from crystallm_jax.data.corpus import EMBEDDED, corpus_path
from crystallm_jax.data.published_tokens import read_token_records, token_archive_splits
from crystallm_jax.data.readers import cif_files, file_status, input_bytes, read_records, recognise
from crystallm_jax.data.reading.texts import printable
from crystallm_jax.data.record import Record
from crystallm_jax.data.store import SPLITS
from crystallm_jax.errors import DataError


class _Source(NamedTuple):
    path: Path
    split: str | None  # of a token archive; None for any other input


class Inputs:
    """Groups of inputs, one for each split and one to exclude, as one stream of records that counts itself.

    Args:
        groups: paths of the training, validation and test set and of what is to be excluded. The sets of a token
            archive go each to their own group, wherever the archive is given.

    Raises:
        DataError: an input that is not there.
    """

    def __init__(self, groups: tuple[Sequence[str | Path], ...]) -> None:
        self.names = tuple(printable(str(path)) for group in groups for path in group)
        self._groups: list[list[_Source]] = [[] for _ in groups]
        for part, group in enumerate(groups):
            for path in map(_resolve, group):
                splits = token_archive_splits(path)
                if not splits and path.is_file():
                    recognise(path)  # now: a wrong file should not end the run after hours
                for split in splits or (None,):
                    # Everything of an archive that is to be excluded is.
                    apart = split is not None and part < len(SPLITS)
                    self._groups[SPLITS.index(split) if apart else part].append(_Source(path, split))
        self._ends: list[int] = []

    @property
    def has_sets_apart(self) -> bool:
        """Whether there is a validation or test set of its own."""
        return any(self._groups[1 : len(SPLITS)])

    def lie_among(self, names: Iterable[str], folder: Path) -> Path | None:
        """The first input that is the folder, as token files, or a file of one of these names in it."""
        folder, names = folder.resolve(), frozenset(names)
        for source in self._sources():
            path = source.path.resolve()
            if (path.parent == folder and path.name in names) or (
                path == folder and source.split is not None
            ):
                return source.path
        return None

    def bytes(self) -> int:
        """Bytes on disk that will be read, without token archives."""
        return sum(input_bytes(source.path) for source in self._sources() if source.split is None)

    def fingerprint(self) -> list[list[Any]]:
        """What tells whether the inputs are still the same: names, sizes and times, for each group."""
        return [[[str(s.path.resolve()), s.split, *_stamp(s)] for s in group] for group in self._groups]

    def records(self, on_bytes: Callable[[int], None]) -> Iterator[Record]:
        """All records, group by group; `on_bytes` is called with the number of further bytes read."""
        count = 0
        self._ends = []
        for group in self._groups:
            for source in group:
                read = (
                    partial(read_records, on_bytes=on_bytes)
                    if source.split is None
                    else partial(read_token_records, split=source.split)
                )
                for record in read(source.path):
                    count += 1
                    yield record
            self._ends.append(count)

    def part(self, place: int) -> int:
        """The group of a record that was read, by its number."""
        return bisect.bisect_right(self._ends, place)

    def _sources(self) -> Iterator[_Source]:
        return (source for group in self._groups for source in group)


def _resolve(path: str | Path) -> Path:
    """The file of an input; `embedded` is the corpus in the package."""
    found = corpus_path() if str(path) == EMBEDDED and not Path(path).exists() else Path(path)
    if not found.exists():
        raise DataError(f"no file or folder {path}: check the name")
    return found


def _stamp(source: _Source) -> list[Any]:
    """Size and time of a file; of a folder, a digest of those of all files that are read from it."""
    if source.path.is_file():
        status = source.path.stat()
        return [status.st_size, status.st_mtime_ns]
    # Other files may change meanwhile: --out may lie in the folder.
    files = cif_files(source.path) if source.split is None else sorted(source.path.glob(f"{source.split}.*"))
    digest = hashlib.sha256()
    for file in files:
        status = file_status(file)
        digest.update(os.fsencode(file))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return [digest.hexdigest()]
