"""Readers: what a user has on disk, one record at a time.

What a file is, is told from its first bytes; its name is asked only where they do not say. A file that cannot
be read at all raises; one bad record among good ones is handed on with its `problem`, so that it can be counted.
Whatever the number of records, no more than a few of them are in memory.
"""

import csv
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from crystallm_jax.data.reading.archives import is_tar, read_tar, read_zip
from crystallm_jax.data.reading.extxyz import looks_like_frames, read_extxyz
from crystallm_jax.data.reading.streams import (
    DAMAGE,
    LARGEST_TEXT,
    Meter,
    OnBytes,
    nothing,
    open_unpacked,
    unreadable,
)
from crystallm_jax.data.reading.table_files import read_csv, read_jsonl, read_parquet, read_pickle
from crystallm_jax.data.reading.texts import cif_records, decode_cif, is_cif_name, name_id, split_blocks
from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError

SUPPORTED = (
    "a folder, .zip or .tar of .cif files, a .cif file, a .csv or .parquet with a column 'cif', a .jsonl, "
    "an .extxyz, or a published .pkl.gz (all but .zip and .parquet also compressed by gzip or xz)"
)

Kind = Literal["cif", "csv", "zip", "tar", "jsonl", "extxyz", "parquet", "pickle"]

_HEAD = 1 << 16
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
_PARQUET = b"PAR1"
# What each protocol begins a pickled list with.
_PICKLES = re.compile(rb"\x80[\x02-\x05]|\]q|\(l")
# How a CIF begins, after blank lines and comments. Further on, a column of some table may hold CIFs.
_CIF = re.compile(
    rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*[ \t]*(?:data_|loop_|_cell_|_symmetry_|_chemical_)", re.IGNORECASE
)
_NAMES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("cif", (".cif",)),
    ("csv", (".csv",)),
    ("zip", (".zip",)),
    ("tar", (".tar", ".tgz", ".txz")),
    ("jsonl", (".jsonl", ".ndjson", ".json")),
    ("extxyz", (".extxyz", ".xyz")),
    ("parquet", (".parquet",)),
    ("pickle", (".pkl", ".pickle")),
)
_TEXTS = frozenset({"cif", "csv", "jsonl", "extxyz"})


def read_records(path: str | Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of a folder or file, in a fixed order; their ids need not be unlike each other.

    A folder is searched to its bottom, in sorted order, and ids are the relative names without `.cif`; so are
    those of archives, in the archive's order. A CIF of several structures gives one record a data block,
    `NAME#BLOCK`. In tables and frames, ids stand in `material_id`, `id`, `immutable_id` or the first column
    whose name ends in `id`; without one they are the row numbers.

    Args:
        path: what `SUPPORTED` lists.
        on_bytes: called with the bytes that were read since the last call; they add up to `input_bytes(path)`.

    Raises:
        DataError: nothing there, an unknown kind of file, no records, an empty, binary, broken or hostile
            file; the last also while reading, where a file turns out to be so.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no file or folder {path}: check the name")
    if path.is_dir():
        records = _read_folder(path, on_bytes)
    else:
        meter = Meter(path.stat().st_size, on_bytes)
        records = _finished(_read_file(path, meter.add), meter)
    # The first record at once: most of what can be wrong with a file shows there.
    first = next(records, None)
    if first is None:
        raise DataError(f"{path} holds no structures: give {SUPPORTED}")
    return itertools.chain((first,), records)


def input_bytes(path: str | Path) -> int:
    """The bytes that `read_records` will read: the file's, or those of all the CIFs of a folder.

    Raises:
        DataError: nothing there.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no file or folder {path}: check the name")
    return sum(file_status(p).st_size for p in cif_files(path)) if path.is_dir() else path.stat().st_size


def recognise(path: Path) -> Kind:
    """What kind of file it is, by its first bytes; by its name where they do not say.

    Raises:
        DataError: empty, binary, broken or of no kind that is read.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: give {SUPPORTED}")
    with path.open("rb") as raw:
        magic = raw.read(4)
    if magic in _ZIPS:
        return "zip"
    if magic == _PARQUET:
        return "parquet"
    try:
        with open_unpacked(path) as stream:
            head = stream.read(_HEAD)
    except DAMAGE as error:
        raise unreadable(path, error) from error
    by_content = _by_content(head)
    if by_content is not None:
        return by_content
    name = re.sub(r"\.(gz|xz)$", "", path.name.lower())
    by_name = next((kind for kind, endings in _NAMES if name.endswith(endings)), None)
    if by_name is None:
        raise DataError(f"{path}: unknown kind of file; give {SUPPORTED}")
    if by_name in _TEXTS and b"\x00" in head:
        raise DataError(f"{path} is binary (a zero byte at {head.index(0)}): a text was expected")
    return by_name


def _by_content(head: bytes) -> Kind | None:
    if is_tar(head):
        return "tar"
    if _PICKLES.match(head):
        return "pickle"
    return None if b"\x00" in head else _by_text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _by_text(text: bytes) -> Kind | None:
    if text.startswith(b"{"):
        return "jsonl"
    if looks_like_frames(text):
        return "extxyz"
    if _has_cif_column(text.partition(b"\n")[0]):
        return "csv"
    return "cif" if _CIF.match(text) else None


def _has_cif_column(line: bytes) -> bool:
    try:
        return "cif" in next(csv.reader([line.decode("utf-8", "replace")], strict=True), [])
    except csv.Error:
        return False


def _read_file(path: Path, on_bytes: OnBytes) -> Iterator[Record]:
    readers: dict[Kind, Callable[[Path, OnBytes], Iterator[Record]]] = {
        "cif": _read_cif,
        "csv": read_csv,
        "zip": read_zip,
        "tar": read_tar,
        "jsonl": read_jsonl,
        "extxyz": read_extxyz,
        "parquet": read_parquet,
        "pickle": read_pickle,
    }
    return readers[recognise(path)](path, on_bytes)


def _finished(records: Iterator[Record], meter: Meter) -> Iterator[Record]:
    yield from records
    meter.finish()


def _read_cif(path: Path, on_bytes: OnBytes) -> Iterator[Record]:
    text = decode_cif(_read_bytes(path), str(path))
    on_bytes(path.stat().st_size)
    return split_blocks(name_id(path.name), text)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise unreadable(path, error) from error


def _read_folder(folder: Path, on_bytes: OnBytes) -> Iterator[Record]:
    found = False
    for file in cif_files(folder):
        found = True
        record_id = name_id(file.relative_to(folder).as_posix())
        if file.is_dir():
            yield Record(record_id, "", f"{file} is a link to a folder: give that as an input of its own")
            continue
        try:
            data = _read_bytes(file)
        except DataError as error:
            yield Record(record_id, "", str(error))
            continue
        yield from cif_records(record_id, data, str(file))
        on_bytes(file_status(file).st_size)
    if not found:
        raise DataError(f"no .cif files in the folder {folder} or below it: give {SUPPORTED}")


def cif_files(folder: Path) -> Iterator[Path]:
    """The CIFs of a folder and those below it, sorted; the names of one folder at a time are in memory."""
    waiting: list[Iterator[Path]] = [_sorted_paths(folder)]
    while waiting:
        path = next(waiting[-1], None)
        if path is None:
            waiting.pop()
        elif path.is_dir() and not path.is_symlink():
            waiting.append(_sorted_paths(path))
        elif path.is_dir() or (is_cif_name(path.name) and (path.is_file() or not path.exists())):
            yield path  # links to folders and to nothing too: they are records that cannot be read


def file_status(path: Path) -> os.stat_result:
    """Size and times of a file, or of a link that leads to nothing."""
    try:
        return path.stat()
    except OSError:
        return path.lstat()


def _sorted_paths(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): check who may read it") from error
    return (folder / name for name in names)
