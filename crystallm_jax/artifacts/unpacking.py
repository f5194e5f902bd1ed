"""Unpacks published archives: nothing outside its folder, nothing but plain files, and no more than is plausible."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from crystallm_jax.data.reading.archives import MEMBER_DAMAGE, check_zip_member, tar_members
from crystallm_jax.data.reading.streams import OnBytes, nothing, unreadable
from crystallm_jax.errors import DataError
from crystallm_jax.files import is_free, new_file, scratch_folder

CHECKPOINT = "ckpt.pt"

_CHUNK = 1 << 20
# Prompts, some hundred bytes in a tar's blocks of 512, unpack to sixty times their size; deflate's limit is 1,030.
_MOST_EXPANSION = 100
_FREE_EXPANSION = 64 * 2**20
# What a member takes though it be empty.
_MEMBER = 512


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


class _File(NamedTuple):
    name: str
    size: int
    stream: _Readable


def unpack(archive: Path, folder: Path, *, on_bytes: OnBytes = nothing) -> None:
    """Unpack a tar or zip into `folder`, which appears once it is whole.

    Where all of the archive lies in one folder, that one is not repeated inside of `folder`.

    Args:
        archive: .tar, .tar.gz, .tar.xz or .zip.
        folder: is not there yet, or is empty.
        on_bytes: told of the bytes of the archive as they are read.

    Raises:
        DataError: the archive is damaged, names a place outside of it, holds a link or a device, or unpacks to more
            than is plausible; the folder holds something, or cannot be written.
    """
    check_free(folder)
    try:
        with scratch_folder(folder) as partial:
            for file in _files(archive, on_bytes):
                target = partial / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(archive, file, target)
            inside = list(partial.iterdir())
            root = inside[0] if len(inside) == 1 and inside[0].is_dir() else partial
            root.replace(folder)
    except FileExistsError as error:
        raise DataError(
            f"{archive}: two members want to be {error.filename}: refused; unpack it by hand"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive}: cannot be unpacked into {folder}: {_why(error)}") from None


def check_free(folder: Path) -> None:
    """See that something new may be put at `folder`.

    Raises:
        DataError: something is there.
    """
    if not is_free(folder):
        raise DataError(f"{folder}: is there already: remove it, or unpack somewhere else")


def checkpoint_of(archive: Path, out: Path) -> Path:
    """Copy the one `ckpt.pt` of a published model's archive to `out`, which appears once it is whole; returns `out`.

    Raises:
        DataError: there is none or more than one in it, or what `unpack` raises.
    """
    found: list[str] = []
    try:
        with new_file(out, synced=False) as partial:
            # To its end, where the archive's checksum is.
            for file in _files(archive, nothing):
                if file.name.rpartition("/")[2] == CHECKPOINT:
                    if not found:
                        _write(archive, file, partial)
                    found.append(file.name)
            if len(found) != 1:
                held = f"{len(found)}: {', '.join(found[:3])}" if found else "none"
                raise DataError(f"{archive}: holds {held}, where one {CHECKPOINT} was expected")
    except OSError as error:
        raise DataError(f"{archive}: its {CHECKPOINT} cannot be written to {out}: {_why(error)}") from None
    return out


def _files(archive: Path, on_bytes: OnBytes) -> Iterator[_File]:
    """The plain files of an archive, as long as they do not add up to more than it can hold."""
    allowed = _MOST_EXPANSION * archive.stat().st_size + _FREE_EXPANSION
    is_zip = zipfile.is_zipfile(archive) and archive.suffix == ".zip"
    members = _zip_files(archive, on_bytes) if is_zip else _tar_files(archive, on_bytes)
    for file in members:
        allowed -= file.size + _MEMBER
        if allowed < 0:
            raise DataError(
                f"{archive}: unpacks to over {_MOST_EXPANSION} times its size, as only a trap does: refused; get it "
                "from elsewhere"
            )
        yield file


def _tar_files(archive: Path, on_bytes: OnBytes) -> Iterator[_File]:
    for member in tar_members(archive, on_bytes):
        yield _File(member.name, member.size, member.stream)


def _zip_files(archive: Path, on_bytes: OnBytes) -> Iterator[_File]:
    try:
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                check_zip_member(archive, info)
            for info in opened.infolist():
                if not info.is_dir():
                    # It yields no more than the size that is given, and compares the checksum there.
                    with opened.open(info) as stream:
                        yield _File(info.filename, info.file_size, stream)
                on_bytes(info.compress_size)
    except MEMBER_DAMAGE as error:
        if isinstance(error, (DataError, OSError)):
            raise
        raise unreadable(archive, error) from None


def _write(archive: Path, file: _File, target: Path) -> None:
    with target.open("xb") as out:
        for data in _pieces(archive, file):
            out.write(data)


def _pieces(archive: Path, file: _File) -> Iterator[bytes]:
    try:
        while data := file.stream.read(_CHUNK):
            yield data
    except MEMBER_DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(archive, error) from None


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
