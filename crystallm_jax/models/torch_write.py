"""Writes the zip files that `torch.load` reads, without PyTorch.

Such a file describes an object by a pickle of a few opcodes, which are written here one by one, and holds the numbers
of each tensor in a member of its own. The same object gives the same bytes.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.errors import ModelError
from crystallm_jax.files import new_file

# Of the members' beginnings, as torch.save has it, so that they can be mapped into memory.
_ALIGNMENT = 64
_ROOT = "archive"
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
# The id of an extra field that only fills.
_PADDING_ID = 0x4246
_EXTRA_HEADER = 4
# The earliest date that a zip archive knows.
_DATE = (1980, 1, 1, 0, 0, 0)


def write_torch_file(path: str | Path, value: Any) -> None:
    """Write plain containers, numbers, texts and float32 arrays as `torch.save` would; arrays become tensors.

    Arrays may be views of any strides; each is made contiguous when its turn comes. One that occurs twice is written
    once, and its tensors share it. The file appears under its name when it is complete.

    Raises:
        ModelError: it cannot be written.
        TypeError: there is something else in it.
    """
    path = Path(path)
    arrays: dict[int, tuple[int, np.ndarray]] = {}
    description = b"\x80\x02" + b"".join(_opcodes(value, arrays)) + b"."
    with (
        new_file(path, ModelError) as partial,
        zipfile.ZipFile(partial, "w") as archive,
    ):
        _write_member(archive, "data.pkl", description)
        _write_member(archive, "byteorder", b"little")
        for key, array in arrays.values():
            numbers = np.ascontiguousarray(array, "<f4")
            _write_member(archive, f"data/{key}", numbers.reshape(-1).view(np.uint8).data)
        _write_member(archive, "version", b"3\n")


def _write_member(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"{_ROOT}/{name}", _DATE)
    info.file_size = len(content)
    zip64 = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # where zipfile adds a field of its own
    position = archive.fp.tell() if archive.fp else 0
    begin = position + _LOCAL_HEADER + len(info.filename) + _EXTRA_HEADER + zip64 * _ZIP64_EXTRA
    filling = -begin % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, filling) + b"Z" * filling
    with archive.open(info, "w") as member:
        member.write(content)


def _opcodes(value: Any, arrays: dict[int, tuple[int, np.ndarray]]) -> Iterator[bytes]:
    """The opcodes that build a value; its arrays are added to `arrays` by identity, with their keys."""
    match value:
        case np.ndarray() if value.dtype == np.float32:
            yield _tensor(value, arrays)
        case tuple() | list():
            begin, end = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
            yield begin
            for item in value:
                yield from _opcodes(item, arrays)
            yield end
        case Mapping():
            yield b"}("
            for key, item in value.items():
                yield from _opcodes(key, arrays)
                yield from _opcodes(item, arrays)
            yield b"u"
        case _:
            yield _scalar(value)


def _scalar(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return _text(value)
    raise TypeError(f"{type(value).__name__} has no place in a checkpoint")


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def _tensor(array: np.ndarray, arrays: dict[int, tuple[int, np.ndarray]]) -> bytes:
    """A contiguous tensor over a storage of its own."""
    key, _ = arrays.setdefault(id(array), (len(arrays), array))
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
    storage = (
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(key)) + _text("cpu")
        + _integer(array.size) + b"tQ"
    )  # fmt: skip
    shape, steps = (b"(" + b"".join(map(_integer, sizes)) + b"t" for sizes in (array.shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + _integer(0)
        + shape
        + steps
        + b"\x89"
        + hooks
        + b"tR"
    )
