"""What a prepared folder holds, counted in one pass over its tokens, and whether it is whole.

Tokens are read in pieces of whole records, so that memory stays bounded; of a record only its length is kept.
"""

import csv
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.cif import ELEMENTS, SPACEGROUPS, CIFTokenizer
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, TOKENS
from crystallm_jax.data.reading.tokenfiles import unpacked_folder
from crystallm_jax.data.reasons import DroppedGroup, Reasons
from crystallm_jax.data.store import SPLITS, TOKEN_DTYPE, StoreHeader, TokenStore, read_header
from crystallm_jax.errors import DataError

CONTEXTS = (1024, 2048)
"""Context lengths, in tokens, for which longer records are counted."""

_PIECE_TOKENS = 1 << 22
_PIECE_BYTES = 1 << 24
_MOST_BINS = 256
_FIRST_BIN = 8


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Records' lengths in tokens.

    Attributes:
        longer: for each of `CONTEXTS`, how many records are longer.
        bin_width: of the histogram, tokens.
        histogram: how many records are `i * bin_width` to `(i + 1) * bin_width - 1` tokens long.
    """

    shortest: int
    median: float
    mean: float
    p95: float
    longest: int
    longer: Mapping[int, int]
    bin_width: int
    histogram: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SplitDescription:
    """One split, by records and tokens.

    Attributes:
        elements: records that contain each element, all 89 of the vocabulary.
        spacegroups: records of each space group that occurs.
        without_spacegroup: records that name none.
        token_counts: occurrences of each token of the vocabulary (space groups with the suffix `_sg`).
        underrepresented: records that are marked so.
        sha256: of the .bin, as the header says; empty where there is none.
    """

    records: int
    tokens: int
    lengths: Lengths
    elements: Mapping[str, int]
    spacegroups: Mapping[str, int]
    without_spacegroup: int
    token_counts: Mapping[str, int]
    unk: int
    underrepresented: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class StoreDescription:
    """A prepared folder; `problems` says, a line each, what is not as its header or its format want it.

    Attributes:
        format: 0 for published files that have no header.
        checked: whether the checksums were compared.
        dropped: what was dropped, most often first.
    """

    folder: str
    format: int
    vocab_size: int
    vocabulary_sha256: str
    splits: Mapping[str, SplitDescription]
    sources: tuple[str, ...]
    options: Mapping[str, Any]
    counts: Mapping[str, int]
    versions: Mapping[str, str]
    dropped: tuple[DroppedGroup, ...]
    checked: bool
    problems: tuple[str, ...]


def describe(folder: str | Path, *, verify: bool = True) -> StoreDescription:
    """Count what a prepared folder holds and check that it is whole.

    Args:
        folder: a prepared folder, a published token folder, or a published token archive (which is unpacked
            once, into a folder beside it).
        verify: compare the files' checksums too, which reads them a second time.

    Raises:
        DataError: the folder holds no tokens, or a header that cannot be read; an archive that is none.
    """
    folder = Path(folder)
    if folder.is_file():
        folder = unpacked_folder(folder)
    header = _header(folder)
    splits: dict[str, SplitDescription] = {}
    problems: list[str] = []
    for split in _listed_splits(folder, header):
        try:
            store = TokenStore.open(folder, split)
            splits[split], found = _describe_split(store)
            problems += found
            if verify and store.header.format:
                store.verify()
        except DataError as error:
            problems.append(str(error))
    dropped, rows = _read_dropped(folder / "dropped.csv")
    if header is not None:
        problems += _count_problems(header, rows)
    tokenizer = CIFTokenizer()
    bare = StoreHeader(0, tokenizer.vocab_size, "", {})
    kept = header or bare
    return StoreDescription(
        str(folder),
        kept.format,
        kept.vocab_size,
        kept.vocabulary_sha256,
        splits,
        kept.sources,
        kept.options,
        kept.counts,
        kept.versions,
        dropped,
        verify and header is not None,
        tuple(problems),
    )


def _header(folder: Path) -> StoreHeader | None:
    """The header; None where the folder has only published files.

    Raises:
        DataError: no folder, no tokens, or no header that can be read.
    """
    if not folder.is_dir():
        raise DataError(f"no prepared folder {folder}: give one that 'crystallm prepare --out' wrote")
    if not any((folder / f"{split}.bin").is_file() for split in SPLITS):
        wanted = ", ".join(f"{split}.bin" for split in SPLITS)
        raise DataError(
            f"{folder} is no prepared folder (none of {wanted}): give one that 'crystallm prepare' wrote"
        )
    return read_header(folder) if (folder / "meta.json").is_file() else None


def _listed_splits(folder: Path, header: StoreHeader | None) -> list[str]:
    """The splits that the header lists or that lie there: one without the other is a problem."""
    listed = () if header is None else header.splits
    return [split for split in SPLITS if split in listed or (folder / f"{split}.bin").is_file()]


class _Counts:
    """What is added up over the pieces of a split."""

    def __init__(self) -> None:
        tokenizer = CIFTokenizer()
        self.data_id = tokenizer.token_to_id["data_"]
        self.first_spacegroup = next(i for i, t in enumerate(TOKENS) if t.endswith(SPACEGROUP_SUFFIX))
        self.tokens = np.zeros(1 << 16, np.int64)
        self.elements = np.zeros(len(ELEMENTS), np.int64)
        self.spacegroups = np.zeros(len(SPACEGROUPS), np.int64)
        self.wrong_starts = 0

    def add(self, piece: np.ndarray, starts: np.ndarray) -> None:
        """Count the tokens of some whole records; starts are relative to the piece."""
        self.tokens += np.bincount(piece, minlength=len(self.tokens))
        self.wrong_starts += int(np.count_nonzero(piece[starts] != self.data_id))
        # The elements are the first tokens of the vocabulary. A record names each several times.
        places = np.flatnonzero(piece < len(ELEMENTS))
        present = np.zeros((len(starts), len(ELEMENTS)), bool)
        present[_records_of(places, starts), piece[places]] = True
        self.elements += present.sum(axis=0)
        group = piece - np.uint16(self.first_spacegroup)  # wraps round below it
        places = np.flatnonzero(group < len(SPACEGROUPS))
        _, first = np.unique(_records_of(places, starts), return_index=True)
        self.spacegroups += np.bincount(group[places[first]], minlength=len(SPACEGROUPS))


def _records_of(places: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(starts, places, side="right") - 1


def _pieces(store: TokenStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, starts relative to them) of whole records, about `_PIECE_TOKENS` at a time.

    They are read, not mapped: the pages of a map that was run through stay with the process.
    """
    path, size = store.folder / f"{store.split}.bin", TOKEN_DTYPE.itemsize
    starts, n_tokens = store.starts, len(store.tokens)
    begin = 0
    while begin < len(starts):
        origin = int(starts[begin])
        end = max(int(np.searchsorted(starts, origin + _PIECE_TOKENS)), begin + 1)
        stop = int(starts[end]) if end < len(starts) else n_tokens
        yield np.fromfile(path, TOKEN_DTYPE, stop - origin, offset=origin * size), starts[begin:end] - origin
        begin = end


def _describe_split(store: TokenStore) -> tuple[SplitDescription, list[str]]:
    counts = _Counts()
    for piece, starts in _pieces(store):
        counts.add(piece, starts)
    lengths = _lengths(np.diff(store.starts, append=len(store.tokens)))
    tokenizer = CIFTokenizer()
    tokens = counts.tokens[: tokenizer.vocab_size].tolist()
    spacegroups = dict(zip(SPACEGROUPS, counts.spacegroups.tolist(), strict=True))
    marked, problems = _marked(store)
    stated = store.header.splits[store.split]
    description = SplitDescription(
        records=len(store),
        tokens=len(store.tokens),
        lengths=lengths,
        elements=dict(zip(ELEMENTS, counts.elements.tolist(), strict=True)),
        spacegroups={symbol: count for symbol, count in spacegroups.items() if count},
        without_spacegroup=len(store) - sum(spacegroups.values()),
        token_counts=dict(zip(TOKENS, tokens, strict=True)),
        unk=tokens[tokenizer.unk_id],
        underrepresented=marked,
        sha256=stated.sha256,
    )
    beyond = int(counts.tokens[tokenizer.vocab_size :].sum())
    problems += _split_problems(store, description, wrong_starts=counts.wrong_starts, beyond=beyond)
    return description, problems


def _split_problems(
    store: TokenStore, found: SplitDescription, *, wrong_starts: int, beyond: int
) -> list[str]:
    path = store.folder / f"{store.split}.bin"
    problems = []
    if int(store.starts[0]) != 0:
        problems.append(f"{path} begins with {int(store.starts[0]):,} tokens that belong to no record")
    if wrong_starts:
        problems.append(f"{path} has {wrong_starts:,} records that do not start with 'data_'")
    if beyond:
        problems.append(f"{path} has {beyond:,} ids outside the vocabulary of {len(TOKENS)}")
    if store.header.format == 0:
        return problems
    stated = store.header.splits[store.split]
    for name, ours, theirs in (
        ("longest record", found.lengths.longest, stated.longest),
        ("<unk> count", found.unk, stated.unk),
    ):
        if ours != theirs:
            problems.append(f"{path} has the {name} {ours:,}, meta.json says {theirs:,}")
    ids = store.folder / f"{store.split}.ids.txt"
    listed = _count_lines(ids)
    if listed != found.records:
        there = "is missing" if listed is None else f"has {listed:,} ids for {found.records:,} records"
        problems.append(f"{ids} {there}")
    return problems


def _marked(store: TokenStore) -> tuple[int, list[str]]:
    """How many records are marked as under-represented, and what is wrong with the marks."""
    try:
        return len(store.underrepresented), []
    except DataError as error:
        # The same error says that there are no marks, which is no problem.
        none = "marks no under-represented" in str(error)
        return 0, [] if none else [str(error)]


def _lengths(lengths: np.ndarray) -> Lengths:
    longest = int(lengths.max())
    width = _FIRST_BIN
    while longest // width >= _MOST_BINS:
        width *= 2
    return Lengths(
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        p95=float(np.percentile(lengths, 95)),
        longest=longest,
        longer={context: int(np.count_nonzero(lengths > context)) for context in CONTEXTS},
        bin_width=width,
        histogram=tuple(np.bincount(lengths // width).tolist()),
    )


def _count_lines(path: Path) -> int | None:
    """Line ends of a file, in pieces; None where there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(_PIECE_BYTES), b""))


def _read_dropped(path: Path) -> tuple[tuple[DroppedGroup, ...], int | None]:
    """Reasons by how often they occur, and the rows; None where there is no file.

    Raises:
        DataError: not as `prepare` writes it.
    """
    if not path.is_file():
        return (), None
    reasons = Reasons()
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(stream)
            next(rows, None)
            for _, stage, reason in rows:
                reasons.add(stage, reason)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({' '.join(str(error).split())}): prepare the folder again"
        ) from error
    groups = reasons.groups()
    return groups, sum(group.inputs for group in groups)


def _count_problems(header: StoreHeader, dropped_rows: int | None) -> list[str]:
    """Where the counts of the header do not add up: nothing may get lost without a word."""
    counts = header.counts
    problems = []
    if {"input", "kept", "dropped"} <= counts.keys():
        if counts["input"] != counts["kept"] + counts["dropped"]:
            problems.append(
                f"meta.json counts {counts['input']:,} inputs, but {counts['kept']:,} kept and "
                f"{counts['dropped']:,} dropped"
            )
        records = sum(split.records for split in header.splits.values())
        if counts["kept"] != records:
            problems.append(f"meta.json counts {counts['kept']:,} kept, its splits have {records:,} records")
        if dropped_rows != counts["dropped"]:
            there = "is missing" if dropped_rows is None else f"lists {dropped_rows:,}"
            problems.append(f"meta.json counts {counts['dropped']:,} dropped, dropped.csv {there}")
    return problems


def merged_histogram(splits: Sequence[SplitDescription]) -> tuple[int, list[int]]:
    """(bin width, records a bin) over some splits: the widths are powers of two times one number."""
    width = max(split.lengths.bin_width for split in splits)
    counts: Counter[int] = Counter()
    for split in splits:
        for i, count in enumerate(split.lengths.histogram):
            counts[i * split.lengths.bin_width // width] += count
    return width, [counts[i] for i in range(max(counts) + 1)]
