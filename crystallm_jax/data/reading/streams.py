"""Byte streams of input files: unpacked as they are read, counted for progress, bounded in memory."""

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from crystallm_jax.errors import DataError

LARGEST_TEXT = 64 * 2**20
"""Bytes that one record may have: far beyond any crystal, and a bound on what a damaged file can claim."""

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a compressed file that is broken or cut short raises."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were read from the disk since the last call."""

_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_BUFFER = 1 << 18


def nothing(count: int) -> None:
    """Take no notice of bytes that were read."""


class Meter:
    """Passes on bytes as they are read, and sees to it that they add up to the file's size at the end."""

    def __init__(self, total: int, on_bytes: OnBytes) -> None:
        self._left = total
        self._on_bytes = on_bytes

    def add(self, count: int) -> None:
        """Pass on `count` bytes, but never more than the file has."""
        count = min(count, self._left)
        if count > 0:
            self._left -= count
            self._on_bytes(count)

    def finish(self) -> None:
        """Pass on what was not read, such as what a reader had no need of."""
        self.add(self._left)


class _Counted(io.RawIOBase):
    """A file that tells how many bytes are read from it."""

    def __init__(self, path: Path, on_bytes: OnBytes) -> None:
        self._file = path.open("rb", buffering=0)
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._on_bytes(count)
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def open_raw(path: Path, on_bytes: OnBytes = nothing) -> BinaryIO:
    """Open a file as it lies on the disk, buffered."""
    return io.BufferedReader(_Counted(path, on_bytes), _BUFFER)


def open_unpacked(path: Path, on_bytes: OnBytes = nothing) -> BinaryIO:
    """Open a file, unpacked where its first bytes say gzip or xz; closing it closes the file.

    Reading may raise what `DAMAGE` lists.
    """
    raw = open_raw(path, on_bytes)
    magic = cast("io.BufferedReader", raw).peek(len(_XZ))
    if magic.startswith(_GZIP):
        return _Unpacked(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw, mode="rb")), raw)
    if magic.startswith(_XZ):
        return _Unpacked(cast("io.RawIOBase", lzma.LZMAFile(raw, "rb")), raw)
    return raw


class _Unpacked(io.BufferedReader):
    """A buffered unpacking stream that closes the file under it as well."""

    def __init__(self, stream: io.RawIOBase, file: BinaryIO) -> None:
        super().__init__(stream, _BUFFER)
        self._under = file

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._under.close()


def unpack_bytes(data: bytes) -> bytes:
    """What gzip or xz data unpack to, at most one byte more than `LARGEST_TEXT`; other data as they are.

    Raises one of `DAMAGE` where they are broken.
    """
    if data.startswith(_GZIP):
        with gzip.GzipFile(fileobj=io.BytesIO(data), mode="rb") as stream:
            return stream.read(LARGEST_TEXT + 1)
    if data.startswith(_XZ):
        with lzma.LZMAFile(io.BytesIO(data), "rb") as unpacked:
            return unpacked.read(LARGEST_TEXT + 1)
    return data


def read_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines with their ends; None for one over `LARGEST_TEXT`, which is skipped."""
    while line := stream.readline(LARGEST_TEXT + 1):
        if len(line) <= LARGEST_TEXT:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LARGEST_TEXT)
        yield None


def unreadable(path: Path, error: BaseException) -> DataError:
    """The error for a file that is broken or cut short."""
    return DataError(f"{path} cannot be read ({one_line(error)}): check that it is whole")


def one_line(error: BaseException) -> str:
    """An exception's message without line ends, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
