"""Archives of CIFs, zip and tar, read in memory one member at a time; nothing is unpacked to a path they name.

A tar is read as a stream. A zip lists its members at its end, and that list is held: some 600 bytes a member.
"""

import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from crystallm_jax.data.reading.streams import (
    DAMAGE,
    LARGEST_TEXT,
    OnBytes,
    nothing,
    one_line,
    open_raw,
    open_unpacked,
    unreadable,
)
from crystallm_jax.data.reading.texts import cif_records, is_cif_name, name_id
from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError

_BLOCK = 512
_CHUNK = 1 << 20
_LARGEST_HEADER = 1 << 20
_DRIVE = re.compile(r"^[A-Za-z]:")
_ENCRYPTED = 0x1
MEMBER_DAMAGE = (zipfile.BadZipFile, RuntimeError, struct.error, ValueError, *DAMAGE)
"""What zipfile raises on a member that is broken, encrypted, or packed in a way that it does not know."""


class Member(NamedTuple):
    """A file in a tar, with its bytes to be read before the next member is asked for."""

    name: str
    size: int
    stream: "MemberStream"


class MemberStream:
    """The bytes of one member of a tar at `path`."""

    def __init__(self, path: Path, archive: BinaryIO, size: int) -> None:
        self._path = path
        self._archive = archive
        self._left = size
        self._padding = -size % _BLOCK

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer at the end of the member alone.

        Raises:
            DataError: the archive is damaged or cut short.
        """
        data = self._take(min(count, self._left))
        self._left -= len(data)
        return data

    def skip(self) -> None:
        """Pass over what is left."""
        while self._left:
            self.read(_CHUNK)
        self._take(self._padding)
        self._padding = 0

    def _take(self, count: int) -> bytes:
        try:
            data = self._archive.read(count)
        except DAMAGE as error:
            raise unreadable(self._path, error) from error
        if len(data) < count:
            raise unreadable(self._path, EOFError("it ends inside a member"))
        return data


def check_member_name(archive: Path, name: str) -> None:
    """Refuse a member that would leave the folder it was unpacked in.

    Raises:
        DataError: an absolute name or one with `..` parts.
    """
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or ".." in parts:
        raise DataError(
            f"{archive}: the member {name[:200]!r} points out of the archive: refused; get it from elsewhere"
        )


def is_tar(head: bytes) -> bool:
    """Whether a file's first bytes are a tar's first header."""
    try:
        tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def tar_members(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Member]:
    """Yield the plain files of a tar, which may be compressed, in its order.

    The headers are walked here, since `tarfile` keeps every one and reads a header of any length whole.

    Raises:
        DataError: damaged or cut short, a name that points out of the archive, or a link or device in it.
    """
    try:
        with open_unpacked(path, on_bytes) as archive:
            yield from _walk(path, archive)
    except (tarfile.HeaderError, *DAMAGE) as error:
        raise unreadable(path, error) from error


def _walk(path: Path, archive: BinaryIO) -> Iterator[Member]:
    long_name: str | None = None
    size_given: int | None = None
    while any(header := archive.read(_BLOCK)):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.HeaderError("a member of negative size")
        if info.type in {
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
        }:
            data = _header_data(path, archive, size=info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                fields = _pax_fields(data)
                long_name = fields.get("path", long_name)
                size_given = int(fields["size"]) if fields.get("size", "").isdecimal() else None
            continue
        name = info.name if long_name is None else long_name
        size = info.size if size_given is None else size_given
        long_name = size_given = None
        check_member_name(path, name)
        if info.isdir() or name.endswith("/"):
            continue
        if info.type not in {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}:
            kind = "a link" if info.issym() or info.islnk() else "no plain file"
            raise DataError(f"{path}: the member {name[:200]!r} is {kind}: refused; pack plain files alone")
        stream = MemberStream(path, archive, size)
        yield Member(name, size, stream)
        stream.skip()
    if len(header) < _BLOCK:
        raise EOFError("it has no end")
    while archive.read(_CHUNK):
        pass  # to the end, where a compressed file's checksum is compared


def _header_data(path: Path, archive: BinaryIO, *, size: int) -> bytes:
    if size > _LARGEST_HEADER:
        raise tarfile.HeaderError(f"a header of {size:,} bytes")
    stream = MemberStream(path, archive, size)
    data = stream.read(size)
    stream.skip()
    return data


def _pax_fields(data: bytes) -> dict[str, str]:
    """The `path` and `size` of an extended header: lines `LENGTH KEY=VALUE`."""
    fields, position = {}, 0
    while position < len(data) and data[position]:
        length = re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, position)
        if length is None or not length.end() - position < int(length[1]) <= len(data) - position:
            raise tarfile.HeaderError("a broken extended header")
        end = position + int(length[1])
        if length[2].startswith(b"GNU.sparse"):
            raise tarfile.HeaderError("a sparse member")
        fields[length[2].decode("utf-8", "replace")] = data[length.end() : end - 1].decode(
            "utf-8", "surrogateescape"
        )
        position = end
    return fields


def read_tar(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of a tar's CIFs, in its order; other files are passed over.

    Raises:
        DataError: no CIF in it, and what `tar_members` raises; while it is read.
    """
    others = 0
    found = False
    for member in tar_members(path, on_bytes):
        if not _is_wanted(member.name):
            others += 1
            continue
        found = True
        name = _plain_name(member.name)
        if member.size > LARGEST_TEXT:
            yield Record(name_id(name), "", _too_large(name))
            continue
        yield from cif_records(name_id(name), member.stream.read(member.size), f"the member {name!r}")
    if not found:
        raise _no_cifs(path, others)


def read_zip(path: Path, on_bytes: OnBytes = nothing) -> Iterator[Record]:
    """Yield the records of a zip's CIFs, in its order; other files are passed over.

    Raises:
        DataError: at the first record: damaged, no CIF in it, a name that points out of it, or a link.
    """
    try:
        with open_raw(path, on_bytes) as stream, zipfile.ZipFile(stream) as archive:
            for info in archive.infolist():
                check_zip_member(path, info)
            members = [info for info in archive.infolist() if not info.is_dir()]
            wanted = [info for info in members if _is_wanted(info.filename)]
            if not wanted:
                raise _no_cifs(path, len(members))
            for info in wanted:
                yield from _zip_records(archive, info)
    except MEMBER_DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(path, error) from error


def check_zip_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse a member of a zip that would leave the folder it was unpacked in, or that is no plain file.

    Raises:
        DataError: a name that points out of the archive, or none, a link or a device.
    """
    if not info.filename:
        raise DataError(f"{path}: a member without a name: refused; get it from elsewhere")
    # zipfile rewrites the separators of the name, not those of the original.
    for name in {info.filename, info.orig_filename}:
        check_member_name(path, name)
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
        raise DataError(
            f"{path}: the member {info.filename[:200]!r} is {kind}: refused; pack plain files alone"
        )


def _zip_records(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Record]:
    name = _plain_name(info.filename)
    place = f"the member {name!r}"
    if info.file_size > LARGEST_TEXT:
        yield Record(name_id(name), "", _too_large(name))
        return
    try:
        with archive.open(info) as stream:
            data = stream.read(LARGEST_TEXT + 1)
    except MEMBER_DAMAGE as error:
        reason = "it is encrypted" if info.flag_bits & _ENCRYPTED else one_line(error)
        yield Record(name_id(name), "", f"{place} cannot be read ({reason})")
        return
    yield from cif_records(name_id(name), data, place)


def _is_wanted(name: str) -> bool:
    """Whether a member is a CIF, and not one of the shadows that macOS puts beside every file."""
    return is_cif_name(name) and not re.split(r"[/\\]", name)[-1].startswith("._")


def _plain_name(name: str) -> str:
    return re.sub(r"^(\./+)+", "", name)


def _too_large(name: str) -> str:
    return f"the member {name!r} holds over {LARGEST_TEXT // 2**20} MiB: no single crystal; split it"


def _no_cifs(path: Path, others: int) -> DataError:
    return DataError(f"{path} holds no .cif file ({others:,} others): pack CIFs, or give what is in it")
