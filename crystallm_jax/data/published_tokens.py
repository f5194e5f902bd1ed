"""Token folders and published token archives as inputs of a preparation: their records as texts."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.data.reading.archives import MemberStream, tar_members
from crystallm_jax.data.reading.pickles import read_value
from crystallm_jax.data.reading.streams import LARGEST_TEXT
from crystallm_jax.data.reading.texts import is_cif_name
from crystallm_jax.data.reading.tokenfiles import BINS, KNOWN, META, check_meta, is_tar_file
from crystallm_jax.data.record import Record
from crystallm_jax.data.store import SPLITS, TOKEN_DTYPE, TokenStore, find_starts
from crystallm_jax.errors import CIFError, DataError

_CHUNK = 1 << 22
_LARGEST_META = 1 << 20


def token_archive_splits(path: str | Path) -> tuple[str, ...]:
    """The splits of a token folder or token archive, in the order of `SPLITS`; none for anything else.

    An archive is passed through once, but no further than its first CIF.

    Raises:
        DataError: an archive that is damaged, hostile, or of another vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        return tuple(split for split in SPLITS if (path / f"{split}.bin").is_file())
    if not path.is_file() or not is_tar_file(path):
        return ()
    found = set()
    for member in tar_members(path):
        name = member.name.rsplit("/", maxsplit=1)[-1]
        if is_cif_name(name):
            return ()
        if name in KNOWN and name in found:
            raise DataError(f"{path} holds two files {name!r}: pack one token folder alone")
        found.add(name)
        if name == META:
            data = io.BytesIO(member.stream.read(_LARGEST_META + 1))
            place = f"{path}: {name}"
            check_meta(read_value(data, place, limit=_LARGEST_META), place)
    return tuple(split for split, name in zip(SPLITS, BINS, strict=True) if name in found)


def read_token_records(path: str | Path, split: str) -> Iterator[Record]:
    """Yield the records of a split of a token folder or archive, as the texts that a model would write.

    Ids are those of the folder, or the records' numbers from 0 where it has none. An archive is read as it is;
    nothing is unpacked.

    Raises:
        DataError: no such split, or tokens that are damaged or of another vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        yield from _folder_records(path, split)
        return
    if split not in token_archive_splits(path):
        raise DataError(f"{path} has no split {split!r}: give another")
    for member in tar_members(path):
        if member.name.rsplit("/", maxsplit=1)[-1] == f"{split}.bin":
            place = f"{path}: {split}.bin"
            texts = _texts(_stream_records(member.stream, place), place)
            yield from (Record(str(number), text) for number, text in enumerate(texts))


def _folder_records(folder: Path, split: str) -> Iterator[Record]:
    store = TokenStore.open(folder, split)
    records = (store.record(i) for i in range(len(store)))
    texts = _texts(records, str(folder / f"{split}.bin"))
    if store.header.format == 0:
        yield from (Record(str(number), text) for number, text in enumerate(texts))
        return
    with (folder / f"{split}.ids.txt").open(encoding="utf-8", newline="\n") as names:
        for text, name in itertools.zip_longest(texts, names):
            if text is None or name is None:
                raise DataError(
                    f"{folder}: {split}.ids.txt has not one id a record: prepare the folder again"
                )
            yield Record(name.removesuffix("\n"), text)


def _stream_records(stream: MemberStream, place: str) -> Iterator[np.ndarray]:
    """The tokens of each record of a stream, uint16; a few million tokens are in memory."""
    rest = b""
    while data := stream.read(_CHUNK):
        buffer = rest + data
        tokens = np.frombuffer(
            buffer[: len(buffer) // TOKEN_DTYPE.itemsize * TOKEN_DTYPE.itemsize], TOKEN_DTYPE
        )
        if not len(tokens):
            rest = buffer
            continue
        starts = _starts(tokens, place)
        yield from (tokens[a:b] for a, b in itertools.pairwise(starts))
        rest = buffer[int(starts[-1]) * TOKEN_DTYPE.itemsize :]
        if len(rest) > LARGEST_TEXT:
            raise DataError(f"{place}: a record of over {LARGEST_TEXT // 2**20} MiB: these are no CIF tokens")
    if len(rest) % TOKEN_DTYPE.itemsize or not rest:
        raise DataError(f"{place} holds no whole number of uint16 tokens: get the archive anew")
    yield np.frombuffer(rest, TOKEN_DTYPE)


def _starts(tokens: np.ndarray, place: str) -> np.ndarray:
    try:
        starts = find_starts(tokens)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if starts[0] != 0:
        raise DataError(f"{place} does not begin with 'data_': these are no CIF tokens")
    return starts


def _texts(records: Iterator[np.ndarray], place: str) -> Iterator[str]:
    decode = CIFTokenizer().decode
    for number, tokens in enumerate(records):
        try:
            yield decode(tokens)
        except CIFError as error:
            raise DataError(f"{place}: record {number}: {error}; these are no CIF tokens") from error
