"""The published token files: `SPLIT.bin` with pickles beside them, in a folder or in a tar archive.

`meta.pkl` holds the vocabulary, `starts.pkl`, `starts_val.pkl` and `starts_underrep.pkl` offsets of records.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.data.reading.archives import is_tar, tar_members
from crystallm_jax.data.reading.offsets import read_offsets
from crystallm_jax.data.reading.pickles import read_value
from crystallm_jax.data.reading.streams import DAMAGE, one_line, open_unpacked, unreadable
from crystallm_jax.errors import DataError
from crystallm_jax.files import new_folder

META = "meta.pkl"
STARTS = {"train": "starts.pkl", "val": "starts_val.pkl"}
UNDERREPRESENTED = "starts_underrep.pkl"
BINS = ("train.bin", "val.bin", "test.bin")
KNOWN = frozenset({*BINS, META, *STARTS.values(), UNDERREPRESENTED})
"""What is taken out of an archive; anything else in it stays there."""

# Tokens pack to a seventh of their size; a bomb to a thousandth.
_MOST_EXPANSION = 64
_ALLOWANCE = 64 * 2**20
_CHUNK = 1 << 20
_MARKER = "unpacked.json"
_PIECE = 1 << 22

_log = logging.getLogger(__name__)


def is_tar_file(path: Path) -> bool:
    """Whether a file is a tar, also a compressed one.

    Raises:
        DataError: by its name it is, but it cannot be read.
    """
    try:
        with open_unpacked(path) as stream:
            return is_tar(stream.read(512))
    except DAMAGE as error:
        if _stem(path) != path.name:
            raise unreadable(path, error) from error
        return False


def check_vocabulary(folder: Path) -> None:
    """Compare the vocabulary of a folder's `meta.pkl`, where there is one, with ours.

    Raises:
        DataError: they differ, or the file cannot be read.
    """
    path = folder / META
    if not path.is_file():
        return
    try:
        with path.open("rb") as stream:
            meta = read_value(stream, path)
    except OSError as error:
        raise unreadable(path, error) from error
    check_meta(meta, path)


def check_meta(meta: object, place: object) -> None:
    """Compare what a `meta.pkl` holds with our vocabulary.

    Raises:
        DataError: it is no vocabulary, or another one; the first difference is named.
    """
    ids = meta.get("stoi") if isinstance(meta, Mapping) else None
    names = meta.get("itos") if isinstance(meta, Mapping) else None
    size = meta.get("vocab_size", len(TOKENS)) if isinstance(meta, Mapping) else None
    if not isinstance(ids, Mapping) or not isinstance(names, Mapping):
        raise DataError(
            f"{place} holds no 'stoi' and 'itos': it is no vocabulary of a published token folder"
        )
    plain = CIFTokenizer().id_to_token
    by_id = {number: token for token, number in ids.items() if type(number) is int}
    for number, token in enumerate(TOKENS):
        # Published tables write a space group both with and without its mark.
        for found in (by_id.get(number), names.get(number)):
            if found not in {token, plain[number]}:
                raise DataError(
                    f"{place}: token {number} is {_short(found)} there and {token!r} here: "
                    "prepare the structures again with this vocabulary"
                )
    if not len(ids) == len(names) == size == len(TOKENS):
        raise DataError(
            f"{place} has {len(ids)} tokens where {len(TOKENS)} are known: prepare the structures again"
        )


def _short(value: object) -> str:
    return repr(value[:40]) if isinstance(value, str) else "missing"


def read_starts(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Offsets of a published pickle, int64 [records].

    Args:
        path: the pickle.
        tokens: the stream that they point into, uint16 [N].

    Raises:
        DataError: no list of rising offsets of which each points at a `data_` token.
    """
    try:
        with open_unpacked(path) as stream:
            starts = read_offsets(stream, path)
    except OSError as error:
        raise unreadable(path, error) from error
    if not len(starts):
        raise DataError(f"{path} holds no offsets: remove it, and they are found in the tokens")
    rising = starts[0] >= 0 and bool(np.all(np.diff(starts) > 0)) and int(starts[-1]) < len(tokens)
    data_id = CIFTokenizer().token_to_id["data_"]
    pieces = range(0, len(starts), _PIECE) if rising else range(0)
    if not rising or any(np.any(tokens[starts[i : i + _PIECE]] != data_id) for i in pieces):
        raise DataError(
            f"{path} does not hold rising offsets of 'data_' tokens: it belongs to other tokens; remove it, and "
            "they are found in the tokens"
        )
    return starts


def unpacked_folder(archive: Path) -> Path:
    """The folder beside a token archive that holds what is in it; unpacked now where it is not there yet.

    Raises:
        DataError: no token archive, a damaged or hostile one, or no place to unpack it in.
    """
    if not is_tar_file(archive):
        raise DataError(f"{archive} is no prepared folder and no token archive: give one of them")
    folder = archive.with_name(_stem(archive) + ".unpacked")
    stamp = _stamp(archive)
    if _marked(folder) == stamp:
        return folder
    if folder.exists() and _marked(folder) is None:
        raise DataError(f"{folder} is in the way of unpacking {archive.name}: move it elsewhere")
    _log.info("unpacking %s to %s", archive, folder)
    try:
        with new_folder(folder) as partial:
            files = _unpack(archive, partial)
            marker = json.dumps({"archive": stamp, "files": sorted(files)}) + "\n"
            (partial / _MARKER).write_text(marker, encoding="utf-8")
            if folder.exists():
                _set_aside(folder)
    except OSError as error:
        # Another process, which had the same to do, may have been first.
        if _marked(folder) != stamp:
            raise DataError(
                f"{archive} cannot be unpacked beside itself ({one_line(error)}): copy it to a folder with room for it"
            ) from error
    return folder


def _unpack(archive: Path, folder: Path) -> set[str]:
    """Write the known files of an archive into a folder, whatever folder they are in there."""
    room = archive.stat().st_size * _MOST_EXPANSION + _ALLOWANCE
    written: set[str] = set()
    for member in tar_members(archive):
        name = member.name.rsplit("/", maxsplit=1)[-1]
        if name not in KNOWN:
            _log.info("%s: %r is no token file; left in the archive", archive, member.name[:200])
            continue
        if name in written:
            raise DataError(f"{archive} holds two files {name!r}: pack one token folder alone")
        room -= member.size
        if room < 0:
            raise DataError(f"{archive}: {name!r} unpacks to {member.size:,} bytes: refused as a bomb")
        with (folder / name).open("xb") as target:
            while data := member.stream.read(_CHUNK):
                target.write(data)
        written.add(name)
    if not written & set(BINS):
        raise DataError(f"{archive} holds no {BINS[0]} and no {BINS[1]}: it is no token archive")
    return written


def _set_aside(folder: Path) -> None:
    """Clear away what an earlier archive of this name left; what the user added to it is kept, renamed."""
    marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    ours = {*marker["files"], _MARKER}
    if {path.name for path in folder.iterdir()} <= ours:
        shutil.rmtree(folder)
        return
    number = 1
    while (kept := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    _log.warning("%s is of an older archive and has files of yours: kept as %s", folder, kept)
    folder.rename(kept)


def _marked(folder: Path) -> list[int] | None:
    """The stamp of the archive that a folder was unpacked from."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return list(marker["archive"]) if all((folder / name).is_file() for name in marker["files"]) else []
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamp(archive: Path) -> list[int]:
    status = archive.stat()
    return [status.st_size, status.st_mtime_ns]


def _stem(archive: Path) -> str:
    name = archive.name
    for ending in (".tar.gz", ".tar.xz", ".tgz", ".txz", ".tar"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
