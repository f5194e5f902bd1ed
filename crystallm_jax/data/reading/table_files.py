"""Tables of crystals: CSV, lines of JSON, Parquet and pickled lists, a record a row."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crystallm_jax.data.reading.pickles import iterate_list
from crystallm_jax.data.reading.streams import (
    DAMAGE,
    LARGEST_TEXT,
    OnBytes,
    nothing,
    one_line,
    open_raw,
    open_unpacked,
    read_lines,
    unreadable,
)
from crystallm_jax.data.reading.texts import find_id_column, is_text, text_record, value_id
from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError

STRUCTURE_COLUMNS = ("lattice_vectors", "species_at_sites", "cartesian_site_positions")
"""The columns in which OPTIMADE and LeMaterial give a structure."""

# So few, since a value may have 64 MiB.
_BATCH_ROWS = 16
_MiB = 2**20


def read_csv(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of a CSV with a column `cif`.

    Raises:
        DataError: no such column, no rows, not UTF-8 text; a broken or cut file while it is read.
    """
    # The one way that the csv module offers. It bounds what a quote that is never closed can gather.
    csv.field_size_limit(LARGEST_TEXT)
    rows = _csv_rows(path, on_bytes)
    _, header = next(rows, (0, []))
    if "cif" not in header:
        listed = ", ".join(repr(name[:40]) for name in header[:12]) or "none"
        raise DataError(
            f"{path} has no column 'cif' (columns: {listed}): rename the one that holds CIF texts"
        )
    cif_column, id_column = header.index("cif"), find_id_column(header)
    id_place = len(header) if id_column is None else header.index(id_column)
    number = 0
    for number, (line, row) in enumerate(rows, start=1):
        record_id = value_id(row[id_place] if id_place < len(row) else None, number)
        place = f"row {number} (line {line})"
        if len(row) != len(header):
            problem = f"{place} has {len(row)} fields where the header has {len(header)}"
            yield Record(record_id, "", problem)
        else:
            yield text_record(record_id, row[cif_column], place)
    if not number:
        raise DataError(f"{path} has a header and no rows: nothing to read")


class _RowBytes:
    """Counts the bytes of the row that is being read."""

    def __init__(self) -> None:
        self.count = 0


def _csv_rows(path: Path, on_bytes: OnBytes) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row that is not blank; undecodable bytes become lone surrogates."""
    gathered = _RowBytes()
    try:
        with open_unpacked(path, on_bytes) as stream:
            reader = csv.reader(_csv_lines(path, read_lines(stream), gathered), strict=True)
            for row in reader:
                gathered.count = 0
                if row:
                    yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path} is no valid CSV ({error}): check its quotes") from error
    except DAMAGE as error:
        raise unreadable(path, error) from error


def _csv_lines(path: Path, lines: Iterator[bytes | None], gathered: _RowBytes) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        gathered.count += LARGEST_TEXT + 1 if line is None else len(line)
        if line is None or gathered.count > 2 * LARGEST_TEXT:
            raise DataError(
                f"{path}: a row of over {LARGEST_TEXT // _MiB} MiB at line {number}: check its quotes"
            )
        yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8", "surrogateescape")


def read_jsonl(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of lines of JSON, an object each.

    Raises:
        DataError: the first line is no JSON object; a broken or cut file while it is read.
    """
    number = 0
    try:
        with open_unpacked(path, on_bytes) as stream:
            for line in read_lines(stream):
                if line is not None and not line.strip():
                    continue
                number += 1
                record = _json_record(line, number)
                if number == 1 and record is None:
                    raise DataError(
                        f"{path}: the first line is no JSON object: write one object a line, with a 'cif' "
                        "or a 'structure'"
                    )
                yield record or Record(str(number), "", f"line {number} is no JSON object")
    except DAMAGE as error:
        raise unreadable(path, error) from error


def _json_record(line: bytes | None, number: int) -> Record | None:
    if line is None:
        return Record(str(number), "", f"row {number} is over {LARGEST_TEXT // _MiB} MiB")
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except (ValueError, RecursionError):
        return None
    return row_record(row, number) if isinstance(row, dict) else None


def read_parquet(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of a Parquet file, read some rows and only the columns needed at a time.

    Raises:
        DataError: pyarrow is missing, none of the columns is there, no rows, or a broken file.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet needs pyarrow: pip install 'crystallm-jax[parquet]' and try again"
        ) from error
    try:
        # A buffer, so that pages and not whole columns of a row group are in memory.
        with open_raw(path, on_bytes) as stream, pq.ParquetFile(stream, buffer_size=_MiB) as table:
            columns = _wanted_columns(path, list(table.schema_arrow.names))
            number = 0
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for place in range(batch.num_rows):
                    number += 1
                    yield row_record(batch.slice(place, 1).to_pylist()[0], number)
    except (pa.ArrowException, *DAMAGE) as error:
        raise unreadable(path, error) from error


def _wanted_columns(path: Path, names: list[str]) -> list[str]:
    found = [name for name in names if name in {"cif", "structure"}]
    if not found and set(STRUCTURE_COLUMNS) <= set(names):
        found = list(STRUCTURE_COLUMNS)
    if not found:
        listed = ", ".join(repr(name[:40]) for name in names[:12]) or "none"
        raise DataError(f"{path} has no column 'cif' or 'structure' (columns: {listed}): rename one")
    id_column = find_id_column(names)
    return [*found, id_column] if id_column is not None else found


def read_pickle(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of a published list: a pickle of (id, CIF) pairs, which may be compressed.

    Raises:
        DataError: no such list, one that holds anything but plain values, a broken or cut file.
    """

    def half(count: int) -> None:
        # The file is read twice.
        on_bytes(count // 2)

    def opened() -> Any:
        return open_unpacked(path, half)

    for number, item in enumerate(iterate_list(opened, path), start=1):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            yield Record(str(number), "", f"element {number} is no pair of an id and a CIF")
        else:
            yield text_record(value_id(item[0], number), item[1], f"element {number}")


def row_record(row: Mapping[str, Any], number: int) -> Record:
    """The record of a row: its `cif`, its `structure` (pymatgen's dictionary), or its lattice and sites.

    Args:
        row: column to value; None where there is none.
        number: of the row, its id where it has no other.
    """
    name = find_id_column(list(row))
    record_id = value_id(None if name is None else row[name], number)
    place = f"row {number}"
    if row.get("cif") is not None:
        return text_record(record_id, row["cif"], place)
    if row.get("structure") is not None:
        return _json_text(record_id, row["structure"], place)
    if all(row.get(key) is not None for key in STRUCTURE_COLUMNS):
        return _json_text(record_id, {key: row[key] for key in STRUCTURE_COLUMNS}, place)
    if "lattice" in row and "sites" in row:
        return _json_text(record_id, dict(row), place)
    return Record(
        record_id, "", f"{place} has no 'cif', no 'structure' and no {', '.join(STRUCTURE_COLUMNS)}"
    )


def _json_text(record_id: str, value: object, place: str) -> Record:
    try:
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        return Record(record_id, "", f"{place} has a structure that JSON cannot hold ({one_line(error)})")
    if not text.strip():
        return Record(record_id, "", f"{place} has an empty 'structure'")
    if len(text) > LARGEST_TEXT:
        return Record(record_id, "", f"{place} has a 'structure' over {LARGEST_TEXT // _MiB} MiB")
    if not is_text(text):
        return Record(record_id, "", f"{place} has a 'structure' that is not UTF-8 text")
    return Record(record_id, text, form="json")
