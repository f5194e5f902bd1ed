"""The token store: a prepared folder, read through a memory map.

A folder holds, for each split, `SPLIT.bin` (token ids, raw little-endian uint16, as published),
`SPLIT.starts.npy` (int64 offsets at which records start), `SPLIT.ids.txt` (a record id a line), perhaps
`SPLIT.underrep.npy` (the starts of under-represented records), and for all of them `meta.json` and
`dropped.csv`. The published token folders and archives, which have pickles beside the .bin, open as they are.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.cif.vocabulary import vocabulary_sha256
from crystallm_jax.data.reading.tokenfiles import (
    STARTS,
    UNDERREPRESENTED,
    check_vocabulary,
    read_starts,
    unpacked_folder,
)
from crystallm_jax.errors import DataError
from crystallm_jax.files import digest_of

FORMAT = 1
SPLITS = ("train", "val", "test")
TOKEN_DTYPE = np.dtype("<u2")
# What NumPy's reader of .npy files raises on a header that is damaged.
_DAMAGED_NPY = (OSError, ValueError, EOFError, TypeError, OverflowError, SyntaxError, TokenError, Warning)
_SCAN_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True)
class SplitHeader:
    """What `meta.json` says of one split; `sha256` is that of the .bin, empty where there is no header."""

    records: int
    tokens: int
    longest: int
    sha256: str = ""
    unk: int = 0


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What `meta.json` says of a prepared folder; `format` is 0 for published files that have no header."""

    format: int
    vocab_size: int
    vocabulary_sha256: str
    splits: Mapping[str, SplitHeader]
    sources: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    created_by: str = ""

    def to_json(self) -> str:
        """The text of `meta.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """One split of a prepared folder: `tokens` (uint16 [N], memory-mapped) and `starts` (int64 [records])."""

    folder: Path
    split: str
    header: StoreHeader
    tokens: np.memmap[Any, np.dtype[np.uint16]]
    starts: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "TokenStore":
        """Open a split of a prepared folder, of a published token folder, or of a published token archive.

        An archive is unpacked once, into a folder beside it.

        Raises:
            DataError: no such folder or split, a file that is shorter or longer than the header says, another
                vocabulary, an archive that is damaged or hostile.
        """
        folder = Path(folder)
        if folder.is_file():
            folder = unpacked_folder(folder)
        if not folder.is_dir():
            raise DataError(
                f"no prepared folder {folder}: make it with 'crystallm prepare INPUT --out {folder}'"
            )
        path = folder / f"{split}.bin"
        if split not in SPLITS or not path.is_file():
            there = ", ".join(name for name in SPLITS if (folder / f"{name}.bin").is_file()) or "none"
            raise DataError(f"{folder} has no split {split!r} (it has: {there}): prepare it with --split")
        tokens = _map_tokens(path)
        if not (folder / "meta.json").is_file():
            check_vocabulary(folder)
            pickled = folder / STARTS.get(split, "")
            starts = read_starts(pickled, tokens) if pickled.is_file() else find_starts(tokens)
            return cls(folder, split, _bare_header(split, path, tokens=tokens, starts=starts), tokens, starts)
        header = _checked(read_header(folder), folder)
        starts = _checked_starts(folder, split, header=header, n_tokens=len(tokens))
        return cls(folder, split, header, tokens, starts)

    def __len__(self) -> int:
        return len(self.starts)

    def record(self, i: int) -> np.ndarray:
        """Token ids of record `i`, uint16 [T]: a read-only view of the file.

        Raises:
            IndexError: no such record.
        """
        start = int(self.starts[i])
        index = i % len(self.starts)
        end = int(self.starts[index + 1]) if index + 1 < len(self.starts) else len(self.tokens)
        return np.asarray(self.tokens[start:end])

    def text(self, i: int) -> str:
        """The text of record `i`, as a model would write it."""
        return self._tokenizer.decode(self.record(i).tolist())

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The records' ids, in order; their numbers where the folder has only published files.

        Raises:
            DataError: the list has another length than the store.
        """
        path = self.folder / f"{self.split}.ids.txt"
        if self.header.format == 0 and not path.is_file():
            return tuple(str(i) for i in range(len(self)))
        ids = tuple(_read(path).split("\n")[:-1])
        if len(ids) != len(self):
            raise DataError(
                f"{path} has {len(ids):,} ids for {len(self):,} records: prepare the folder again"
            )
        return ids

    @cached_property
    def underrepresented(self) -> np.ndarray:
        """Offsets at which under-represented records start, int64, rising: some of `starts`.

        Raises:
            DataError: none are marked, or what is marked are not starts of records.
        """
        if self.header.format == 0:
            path = self.folder / UNDERREPRESENTED
            marked = read_starts(path, self.tokens) if self.split == "train" and path.is_file() else None
        else:
            path = self.folder / f"{self.split}.underrep.npy"
            marked = _load_offsets(path) if path.is_file() else None
        if marked is None or not len(marked):
            raise DataError(
                f"{self.folder} marks no under-represented records in {self.split!r}: "
                "prepare it with 'crystallm prepare --underrepresented …'"
            )
        if not _ascending(marked, len(self.tokens)) or not _among(marked, self.starts):
            raise DataError(f"{path} does not hold rising starts of records: prepare the folder again")
        return marked

    @cached_property
    def _tokenizer(self) -> CIFTokenizer:
        return CIFTokenizer()

    def verify(self) -> None:
        """Read the whole file and compare its checksum with the header's.

        Raises:
            DataError: they differ, or there is no checksum.
        """
        expected = self.header.splits[self.split].sha256
        path = self.folder / f"{self.split}.bin"
        if not expected:
            raise DataError(
                f"{self.folder} has no meta.json, so no checksum: prepare the structures to have one"
            )
        found = digest_of(path)
        if found != expected:
            raise DataError(
                f"{path} has changed since it was prepared (sha256 {found[:12]}…): prepare it again"
            )


def read_header(folder: str | Path) -> StoreHeader:
    """Read `meta.json` of a prepared folder.

    Raises:
        DataError: missing, not JSON, or of another format.
    """
    path = Path(folder) / "meta.json"
    try:
        fields = json.loads(_read(path))
        splits = {name: SplitHeader(**values) for name, values in fields.pop("splits").items()}
        header = StoreHeader(splits=splits, **{**fields, "sources": tuple(fields.get("sources", ()))})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no header of a prepared folder ({error}): prepare the folder again"
        ) from error
    if header.format != FORMAT:
        raise DataError(f"{path} has format {header.format!r}, this version reads {FORMAT}: prepare it again")
    return header


def find_starts(tokens: np.ndarray) -> np.ndarray:
    """Offsets at which records start: every `data_` at the beginning or after two newlines, int64 [records].

    Args:
        tokens: uint16 [N], scanned in pieces so that memory stays bounded.

    Raises:
        DataError: none is found.
    """
    tokenizer = CIFTokenizer()
    data_id, newline_id = tokenizer.token_to_id["data_"], tokenizer.token_to_id["\n"]
    found = []
    for begin in range(0, len(tokens), _SCAN_TOKENS):
        low = max(begin - 2, 0)
        piece = np.asarray(tokens[low : begin + _SCAN_TOKENS])
        hits = np.flatnonzero(piece == data_id)
        hits = hits[hits + low >= begin]
        after_blank = (piece[np.maximum(hits - 1, 0)] == newline_id) & (
            piece[np.maximum(hits - 2, 0)] == newline_id
        )
        found.append(hits[((hits >= 2) & after_blank) | (hits + low == 0)] + low)
    starts = np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)
    if not len(starts):
        raise DataError(
            "no record starts in the tokens (no 'data_' after an empty line): not a stream of CIF tokens"
        )
    return starts


def _map_tokens(path: Path) -> np.memmap[Any, np.dtype[np.uint16]]:
    size = path.stat().st_size
    if size == 0 or size % TOKEN_DTYPE.itemsize:
        raise DataError(
            f"{path} has {size:,} bytes, no whole number of uint16 tokens: prepare the folder again"
        )
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r")


def _bare_header(split: str, path: Path, *, tokens: np.ndarray, starts: np.ndarray) -> StoreHeader:
    vocab_size = CIFTokenizer().vocab_size
    largest = max(int(tokens[i : i + _SCAN_TOKENS].max()) for i in range(0, len(tokens), _SCAN_TOKENS))
    if largest >= vocab_size:
        raise DataError(
            f"{path} holds the id {largest}, the vocabulary ends at {vocab_size - 1}: not CIF tokens"
        )
    longest = int(np.diff(starts, append=len(tokens)).max())
    summary = SplitHeader(records=len(starts), tokens=len(tokens), longest=longest)
    return StoreHeader(0, vocab_size, vocabulary_sha256(), {split: summary})


def _checked(header: StoreHeader, folder: Path) -> StoreHeader:
    if header.vocabulary_sha256 != vocabulary_sha256():
        raise DataError(
            f"{folder} was prepared with another vocabulary ({header.vocab_size} tokens, sha256 "
            f"{header.vocabulary_sha256[:12]}…): prepare it again with this version"
        )
    return header


def _checked_starts(folder: Path, split: str, *, header: StoreHeader, n_tokens: int) -> np.ndarray:
    if split not in header.splits:
        listed = ", ".join(header.splits)
        raise DataError(
            f"{folder / 'meta.json'} does not list the split {split!r} (it lists: {listed}): prepare again"
        )
    expected = header.splits[split]
    if n_tokens != expected.tokens:
        raise DataError(
            f"{folder / f'{split}.bin'} has {n_tokens:,} tokens, meta.json says {expected.tokens:,}: "
            "truncated or mixed with another; prepare the folder again"
        )
    path = folder / f"{split}.starts.npy"
    starts = _load_offsets(path)
    if starts.shape != (expected.records,) or not _ascending(starts, n_tokens):
        raise DataError(f"{path} does not hold {expected.records:,} rising offsets: prepare the folder again")
    return starts


def _load_offsets(path: Path) -> np.ndarray:
    """Offsets of a .npy file, int64 [N], memory-mapped."""
    try:
        with warnings.catch_warnings(action="error"):
            offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED_NPY as error:
        raise DataError(
            f"{path} cannot be read ({' '.join(str(error).split())}): prepare the folder again"
        ) from error
    if offsets.dtype != np.int64 or offsets.ndim != 1:
        raise DataError(
            f"{path} does not hold rising offsets but {offsets.dtype} {list(offsets.shape)}: prepare again"
        )
    return np.asarray(offsets)


def _among(some: np.ndarray, starts: np.ndarray) -> bool:
    """Whether all of some rising offsets are starts of records."""
    places = np.searchsorted(starts, some)
    return int(places[-1]) < len(starts) and bool(np.array_equal(starts[places], some))


def _ascending(starts: np.ndarray, n_tokens: int) -> bool:
    return (
        len(starts) > 0
        and starts[0] >= 0
        and bool(np.all(np.diff(starts) > 0))
        and int(starts[-1]) < n_tokens
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({' '.join(str(error).split())}): prepare the folder again"
        ) from error
