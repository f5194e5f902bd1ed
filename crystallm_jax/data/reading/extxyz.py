"""Files of extended-XYZ frames, cut into one text a frame."""

import re
from collections.abc import Iterator
from pathlib import Path

from crystallm_jax.data.reading.streams import (
    DAMAGE,
    LARGEST_TEXT,
    OnBytes,
    nothing,
    open_unpacked,
    read_lines,
    unreadable,
)
from crystallm_jax.data.reading.texts import find_id_column, is_text, value_id
from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError

_PAIR = re.compile(r"""(?:^|\s)([^\s=,"']+)\s*=\s*("(?:[^"\\]|\\.)*"|'[^']*'|\{[^}]*\}|[^\s"'{]\S*)""")
_COUNT = re.compile(rb"\s*(\d{1,18})\s*")


def looks_like_frames(head: bytes) -> bool:
    """Whether a file's first bytes are a number of atoms on a line of its own, and a comment after it."""
    first, _, rest = head.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    return _COUNT.fullmatch(first) is not None and b"=" in rest.partition(b"\n")[0]


def read_extxyz(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield a record a frame, its text as it is; what is in it is found out where the structure is made.

    Raises:
        DataError: no frame where one must begin, a file that is cut short or broken; while it is read.
    """
    try:
        with open_unpacked(path, on_bytes) as stream:
            lines = enumerate(read_lines(stream), start=1)
            number = 0
            for line_number, line in lines:
                if line is not None and not line.strip():
                    continue
                number += 1
                yield _frame(path, lines, begin=(line_number, line), number=number)
    except DAMAGE as error:
        raise unreadable(path, error) from error


def _frame(
    path: Path, lines: Iterator[tuple[int, bytes | None]], *, begin: tuple[int, bytes | None], number: int
) -> Record:
    line_number, first = begin
    match = None if first is None else _COUNT.fullmatch(first.removeprefix(b"\xef\xbb\xbf"))
    if match is None:
        raise DataError(
            f"{path}: line {line_number} should be the number of atoms of frame {number}: check the frame before"
        )
    atoms, size, too_large = int(match[1]), 0, False
    kept = [match[1] + b"\n"]
    for _ in range(atoms + 1):
        _, line = next(lines, (0, b""))
        if line == b"":
            raise DataError(
                f"{path}: frame {number} (line {line_number}) is cut short: check that it is whole"
            )
        size += 0 if line is None else len(line)
        too_large = too_large or line is None or size > LARGEST_TEXT
        if line is not None and not too_large:
            kept.append(line)
    text = b"".join(kept).decode("utf-8", "surrogateescape")
    place = f"frame {number} (line {line_number})"
    if too_large:
        return Record(str(number), "", f"{place} is over {LARGEST_TEXT // 2**20} MiB: no single crystal")
    record_id = _frame_id(text.split("\n", 2)[1], number)
    if not is_text(text):
        return Record(record_id, "", f"{place} is not UTF-8 text")
    return Record(record_id, text, form="extxyz")


def _frame_id(comment: str, number: int) -> str:
    pairs = {key: value.strip("\"'{}") for key, value in _PAIR.findall(comment)}
    name = find_id_column(list(pairs))
    return value_id(None if name is None else pairs[name], number)
