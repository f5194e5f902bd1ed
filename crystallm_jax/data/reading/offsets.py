"""Pickled lists of whole numbers, such as the published offsets: millions of them, read as an array."""

import pickletools
import re
from typing import Any, BinaryIO, Final

import numpy as np

from crystallm_jax.data.reading.pickles import read_whole, refusal

_LARGEST = 2**30
# Bytes of the opcodes PROTO, FRAME, MEMOIZE, BINPUT and LONG_BINPUT, which put nothing into the list.
_SILENT: Final = {0x80: 2, 0x95: 9, 0x94: 1, 0x71: 2, 0x72: 5}
_LIST, _MARK, _APPENDS, _APPEND, _LONG1, _STOP = b"](ea\x8a."
_RUN: Final = re.compile(rb"(?:K.)+|(?:M..)+|(?:J.{4})+", re.DOTALL)
_WIDTHS: Final[dict[int, np.dtype[Any]]] = {
    ord("K"): np.dtype("u1"),
    ord("M"): np.dtype("<u2"),
    ord("J"): np.dtype("<i4"),
}


def read_offsets(stream: BinaryIO, place: object) -> np.ndarray:
    """Read a pickled list of whole numbers as int64 [N], thousands at a time.

    A pickler writes the list, then batches of MARK, numbers, APPENDS (or one number and APPEND); anything else
    is refused.

    Args:
        stream: the pickle, unpacked; at most 1 GiB.
        place: what errors call it.

    Raises:
        DataError: damaged, or not a list of integers of at most 8 bytes.
    """
    data = read_whole(stream, place, limit=_LARGEST)
    parts: list[np.ndarray] = []
    position, end = 0, len(data)
    begun, marked, loose = False, False, 0
    while position < end:
        code = data[position]
        numbers, length = _numbers(data, position) if begun else (None, 0)
        if numbers is not None:
            parts.append(numbers)
            loose += len(numbers)
            position += length
        elif code in _SILENT:
            position += _SILENT[code]
        elif (code == _LIST and not begun) or (code == _MARK and begun and not marked and not loose):
            begun, marked = True, code == _MARK
            position += 1
        elif (code == _APPENDS and marked) or (code == _APPEND and not marked and loose == 1):
            marked, loose = False, 0
            position += 1
        elif code == _STOP and begun and not marked and not loose and position == end - 1:
            return np.concatenate(parts) if parts else np.empty(0, np.int64)
        else:
            name = next((op.name for op in pickletools.opcodes if ord(op.code) == code), f"{code:#x}")
            raise refusal(place, f"{name} at byte {position}, where a list of whole numbers was expected")
    raise refusal(place, "it ends before its list does")


def _numbers(data: bytes, position: int) -> tuple[np.ndarray | None, int]:
    """The numbers that stand at a place, int64, and the bytes that they take; None where there are none."""
    code = data[position]
    if code in _WIDTHS:
        run = _RUN.match(data, position)
        if run is None:
            return None, 0
        width = _WIDTHS[code]
        columns = np.frombuffer(run.group(), np.uint8).reshape(-1, width.itemsize + 1)[:, 1:]
        return np.ascontiguousarray(columns).view(width).ravel().astype(np.int64), len(run.group())
    size = data[position + 1] if code == _LONG1 and position + 1 < len(data) else 0
    number = data[position + 2 : position + 2 + size]
    if not 0 < size <= np.dtype(np.int64).itemsize or len(number) < size:
        return None, 0
    return np.array([int.from_bytes(number, "little", signed=True)], np.int64), 2 + size
