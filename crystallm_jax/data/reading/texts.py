"""From the bytes of a CIF to records: one a file, or one a data block where several list atoms."""

import itertools
import re
from collections.abc import Iterator

from crystallm_jax.data.reading.streams import DAMAGE, LARGEST_TEXT, one_line, unpack_bytes
from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError

_SUFFIX = re.compile(r"\.cif(\.gz|\.xz)?$", re.IGNORECASE)
_BLOCK = re.compile(r"^[ \t]*data_", re.MULTILINE | re.IGNORECASE)
_HAS_SITES = re.compile(r"^\s*_atom_site[_.]fract_x\b", re.MULTILINE | re.IGNORECASE)
_LONGEST_ID = 1000
_ID_COLUMNS = ("material_id", "id", "immutable_id")
# English words, not identifiers.
_NO_ID_COLUMN = ("valid", "grid", "solid", "fluid", "hybrid")


def is_cif_name(name: str) -> bool:
    """Whether a file's name ends as a CIF's does, also a compressed one."""
    return _SUFFIX.search(name) is not None


def printable(text: str) -> str:
    """A text on one line, its control characters and whatever is no Unicode escaped: for ids, reports and terminals."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def name_id(name: str) -> str:
    """A record's id from the name of its file: without `.cif`, odd characters escaped."""
    plain = _SUFFIX.sub("", name)
    return plain if plain.isprintable() else plain.encode("unicode_escape").decode("ascii")


def value_id(value: object, number: int) -> str:
    """A record's id from a column; the row's number where the column holds no usable one."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return str(number)
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else str(number)
    plain = value.strip()
    return plain if plain and plain.isprintable() and len(plain) <= _LONGEST_ID else str(number)


def find_id_column(columns: list[str]) -> str | None:
    """The column of ids: `material_id`, `id`, `immutable_id`, or the first whose name ends in `id`."""
    lowered = [name.strip().lower() for name in columns]
    for name in _ID_COLUMNS:
        if name in lowered:
            return columns[lowered.index(name)]
    return next(
        (
            given
            for given, name in zip(columns, lowered, strict=True)
            if name.endswith("id") and not name.endswith(_NO_ID_COLUMN)
        ),
        None,
    )


def cif_records(record_id: str, data: bytes, place: str) -> Iterator[Record]:
    """The records of a CIF file's bytes, which may be compressed; one with a problem where it is no text.

    Args:
        record_id: of the file; a block of several is `ID#BLOCK`.
        data: the file.
        place: what a problem calls it.
    """
    try:
        text = decode_cif(data, place)
    except DataError as error:
        yield Record(record_id, "", str(error))
        return
    yield from split_blocks(record_id, text)


def decode_cif(data: bytes, place: str) -> str:
    """The text of a CIF file's bytes, which may be compressed.

    Raises:
        DataError: empty, binary, not UTF-8, broken compression, or over 64 MiB.
    """
    try:
        data = unpack_bytes(data)
    except DAMAGE as error:
        raise DataError(f"{place} cannot be read ({one_line(error)}): check that it is whole") from error
    if len(data) > LARGEST_TEXT:
        raise DataError(f"{place} holds over {LARGEST_TEXT // 2**20} MiB: no single crystal; split it")
    if not data.strip():
        raise DataError(f"{place} is empty: a CIF text was expected")
    if b"\x00" in data:
        raise DataError(f"{place} is binary (a zero byte at {data.index(0)}): a CIF text was expected")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def split_blocks(record_id: str, text: str) -> Iterator[Record]:
    """One record, or one for each data block that lists atoms where several do."""
    starts = [match.start() for match in _BLOCK.finditer(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])] if len(starts) > 1 else []
    structures = [piece for piece in pieces if _HAS_SITES.search(piece)]
    if len(structures) < 2:
        yield Record(record_id, text)
        return
    for piece in structures:
        block = piece.split(maxsplit=1)[0][len("data_") :]
        yield Record(f"{record_id}#{printable(block[:_LONGEST_ID])}", piece)


def text_record(record_id: str, text: object, place: str) -> Record:
    """The record of a CIF text that stood in a table, or of what stood there instead."""
    if not isinstance(text, str):
        return Record(record_id, "", f"{place} has a 'cif' that is no text but {type(text).__name__}")
    if not text.strip():
        return Record(record_id, "", f"{place} has an empty 'cif'")
    if len(text) > LARGEST_TEXT:
        return Record(record_id, "", f"{place} has a 'cif' over {LARGEST_TEXT // 2**20} MiB")
    if not is_text(text):
        return Record(record_id, "", f"{place} has a 'cif' that is not UTF-8 text")
    return Record(record_id, text)


def is_text(field: str) -> bool:
    """Whether a text can be written as UTF-8 and has no zero bytes."""
    if "\x00" in field:
        return False
    return field.isascii() or not any("\ud800" <= c <= "\udfff" for c in field)
