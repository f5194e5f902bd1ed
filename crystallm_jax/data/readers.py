"""Readers: what a user has on disk, one record (id, CIF text) at a time.

Compression is recognised by a file's first bytes, not by its name. A file that cannot be read at all raises;
one bad record among good ones is handed on with its `problem`, so that it can be counted.
"""

import csv
import gzip
import itertools
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError

SUPPORTED = (
    "a folder of .cif files, a .cif file, or a .csv (also gzipped or xz-compressed) with a column 'cif'"
)

_NOT_YET = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".extxyz",
    ".xyz",
    ".parquet",
    ".pkl",
    ".pkl.gz",
)
_ID_COLUMNS = ("material_id", "id")
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_BLOCK = re.compile(r"^[ \t]*data_", re.MULTILINE | re.IGNORECASE)
_HAS_SITES = re.compile(r"^\s*_atom_site[_.]fract_x\b", re.MULTILINE | re.IGNORECASE)
# Rows of whole structures are long; the csv module stops at 128 KiB unless told otherwise.
_FIELD_LIMIT = 2**31 - 1
_LARGEST_CIF = 64 * 2**20


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a folder of CIFs, a `.cif` file or a CSV, in a fixed order and with unique ids.

    A folder is searched to its bottom, in sorted order, and ids are the relative names without `.cif`. A CIF
    file of several structures gives one record a data block, `NAME#BLOCK`. A CSV's ids stand in
    `material_id`, `id` or the first column whose name ends in `id`; without one they are the row numbers.

    Raises:
        DataError: nothing there, a format that is not read yet, no `cif` column, an empty, binary or broken
            file; the last also while reading, where a file turns out to be cut short.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no file or folder {path}: check the name")
    if path.is_dir():
        return unique_ids(_read_folder(path))
    name = path.name.lower()
    if name.endswith(_NOT_YET):
        raise DataError(f"{path}: this format is not read yet; give {SUPPORTED}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: give {SUPPORTED}")
    if name.endswith((".cif", ".cif.gz", ".cif.xz")):
        return unique_ids(_read_single_cif(path))
    if name.endswith((".csv", ".csv.gz", ".csv.xz")):
        return unique_ids(_read_csv(path))
    raise DataError(f"{path}: unknown kind of file; give {SUPPORTED}")


def unique_ids(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records with blanks in ids made `_` and a repeated id followed by `_2`, `_3` and so on."""
    seen: set[str] = set()
    repeats: dict[str, int] = {}
    for record in records:
        base = "_".join(record.id.split()) or "unnamed"
        name = base
        while name in seen:
            repeats[base] = repeats.get(base, 1) + 1
            name = f"{base}_{repeats[base]}"
        seen.add(name)
        yield record if name == record.id else record._replace(id=name)


def _read_folder(folder: Path) -> Iterator[Record]:
    files = sorted(
        p for p in folder.rglob("*") if p.name.lower().endswith((".cif", ".cif.gz")) and p.is_file()
    )
    if not files:
        raise DataError(f"no .cif files in the folder {folder} or below it: give {SUPPORTED}")
    return (record for file in files for record in _folder_records(file, folder=folder))


def _folder_records(file: Path, *, folder: Path) -> Iterator[Record]:
    record_id = _without_suffix(file.relative_to(folder).as_posix())
    try:
        yield from _blocks(record_id, _read_text(file))
    except DataError as error:
        yield Record(record_id, "", str(error))


def _read_single_cif(path: Path) -> Iterator[Record]:
    return iter(tuple(_blocks(_without_suffix(path.name), _read_text(path))))


def _without_suffix(name: str) -> str:
    return re.sub(r"\.cif(\.gz|\.xz)?$", "", name, flags=re.IGNORECASE)


def _blocks(record_id: str, text: str) -> Iterator[Record]:
    """One record, or one for each data block that lists atoms where several do."""
    starts = [match.start() for match in _BLOCK.finditer(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])]
    structures = [piece for piece in pieces if _HAS_SITES.search(piece)]
    if len(structures) < 2:
        yield Record(record_id, text)
        return
    for piece in structures:
        yield Record(f"{record_id}#{piece.split(maxsplit=1)[0][len('data_') :]}", piece)


def _read_text(path: Path) -> str:
    """The text of one CIF file.

    Raises:
        DataError: empty, binary, not UTF-8, broken compression, or over 64 MiB.
    """
    try:
        with _open(path) as stream:
            data = stream.read(_LARGEST_CIF + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}): check that it is whole") from error
    if len(data) > _LARGEST_CIF:
        raise DataError(f"{path} holds over {_LARGEST_CIF // 2**20} MiB: no single crystal; split it")
    if not data.strip():
        raise DataError(f"{path} is empty: a CIF text was expected")
    if b"\x00" in data:
        raise DataError(f"{path} is binary (a zero byte at {data.index(0)}): a CIF text was expected")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _read_csv(path: Path) -> Iterator[Record]:
    """Open the CSV and check its header at once; the rows follow as they are asked for."""
    # The one way that the csv module offers; raising it harms no other reader.
    csv.field_size_limit(_FIELD_LIMIT)
    rows = _rows(path)
    _, header = next(rows, (0, []))
    if "cif" not in header:
        listed = ", ".join(repr(name[:40]) for name in header[:12]) or "none"
        raise DataError(
            f"{path} has no column 'cif' (columns: {listed}): rename the one that holds CIF texts"
        )
    return _csv_records(path, header, rows=rows)


def _csv_records(path: Path, header: list[str], *, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    cif_column = header.index("cif")
    id_column = _id_column(header)
    number = 0
    for number, (line, row) in enumerate(rows, start=1):
        record_id = (
            str(number)
            if id_column is None or id_column >= len(row)
            else row[id_column].strip() or str(number)
        )
        if not record_id.isprintable():
            record_id = str(number)
        if len(row) != len(header):
            problem = f"row {number} (line {line}) has {len(row)} fields where the header has {len(header)}"
            yield Record(record_id, "", problem)
        elif not row[cif_column].strip():
            yield Record(record_id, "", f"row {number} (line {line}) has an empty 'cif'")
        elif not _is_text(row[cif_column]):
            yield Record(record_id, "", f"row {number} (line {line}) has a 'cif' that is not UTF-8 text")
        else:
            yield Record(record_id, row[cif_column])
    if not number:
        raise DataError(f"{path} has a header and no rows: nothing to read")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row that is not blank; undecodable bytes become lone surrogates."""
    try:
        with _open(path) as stream:
            if b"\x00" in stream.read(65536):
                raise DataError(f"{path} is binary: a CSV text was expected")
        with _open(path) as stream:
            lines = (line.decode("utf-8", errors="surrogateescape") for line in stream)
            reader = csv.reader(_without_bom(lines), strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path} is no valid CSV ({error}): check its quotes") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}): check that it is whole") from error


def _without_bom(lines: Iterator[str]) -> Iterator[str]:
    first = next(lines, "")
    yield first.removeprefix("\ufeff")
    yield from lines


def _id_column(header: list[str]) -> int | None:
    lowered = [name.strip().lower() for name in header]
    for name in _ID_COLUMNS:
        if name in lowered:
            return lowered.index(name)
    return next(
        (i for i, name in enumerate(lowered) if name.endswith("id") and i != header.index("cif")), None
    )


def _is_text(field: str) -> bool:
    return "\x00" not in field and not any("\ud800" <= c <= "\udfff" for c in field if c > "\x7f")


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        magic = stream.read(len(_XZ))
    if magic.startswith(_GZIP):
        return cast("BinaryIO", gzip.open(path, "rb"))
    if magic == _XZ:
        return cast("BinaryIO", lzma.open(path, "rb"))
    return path.open("rb")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
