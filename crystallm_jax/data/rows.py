"""Rows of tokens, cut from a store: windows of the stream, or whole records side by side; those to evaluate on."""

import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from crystallm_jax.data.packing import Batch, Windows, pack
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError

# grain numbers the rows that it shuffles in 32 bits.
_MOST_ROWS = 1 << 32


class Rows(Protocol):
    """Rows of block_size + 1 tokens that batches are made of."""

    def __len__(self) -> int:
        """How many rows there are, each read once an epoch."""

    def read(self, numbers: np.ndarray) -> Batch:
        """Rows by their numbers, int [B]: leaves [B, ...]."""

    def records(self, numbers: np.ndarray) -> list[list[int]]:
        """Numbers of the records that have tokens in these rows, by row."""

    def digest(self) -> str:
        """A checksum of what the rows are, beside the tokens themselves."""


class WindowRows:
    """Windows of the stream, uint16 [B, T + 1], that begin at CIF starts, or anywhere, and run on as published."""

    def __init__(self, store: TokenStore, block_size: int, starts: np.ndarray | None) -> None:
        # Of the map itself a slice costs several times that of a plain array over the same memory.
        self._tokens = np.asarray(store.tokens)
        self._length = block_size + 1
        self._records = store.starts
        self._starts = starts
        self._count = len(self._tokens) - block_size if starts is None else len(starts)

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: np.ndarray) -> Batch:
        """Rows by their numbers."""
        begins = numbers if self._starts is None else self._starts[numbers]
        rows = np.empty((len(numbers), self._length), np.uint16)
        for row, begin in zip(rows, begins.tolist(), strict=True):
            row[:] = self._tokens[begin : begin + self._length]
        return Batch(rows)

    def records(self, numbers: np.ndarray) -> list[list[int]]:
        """The record that each window begins in and those that it runs on into."""
        begins = numbers if self._starts is None else self._starts[numbers]
        first = np.searchsorted(self._records, begins, side="right") - 1
        last = np.searchsorted(self._records, begins + self._length - 1, side="right") - 1
        return [list(range(a, b + 1)) for a, b in zip(first.tolist(), last.tolist(), strict=True)]

    def digest(self) -> str:
        """A checksum of the windows' places."""
        return hashlib.sha256(b"" if self._starts is None else self._starts.tobytes()).hexdigest()


class PackedRows:
    """Whole records side by side in rows, all four leaves of a Batch.

    Attributes:
        truncated: records that are longer than a row and enter with their first tokens.
    """

    def __init__(self, store: TokenStore, block_size: int, records: np.ndarray, *, seed: int) -> None:
        self._tokens = np.asarray(store.tokens)
        self._row_length = block_size + 1
        self._records = starts = np.asarray(store.starts)
        lengths = np.diff(starts, append=len(self._tokens))[records]
        self.truncated = int(np.count_nonzero(lengths > self._row_length))
        plan = pack(lengths, self._row_length, seed=seed)
        # In row order, so that what a row needs lies together.
        self._begins = starts[records][plan.records]
        self._lengths = np.minimum(lengths, self._row_length)[plan.records]
        self._offsets = plan.offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, numbers: np.ndarray) -> Batch:
        """Rows by their numbers."""
        B, R = len(numbers), self._row_length
        first, pieces = self._offsets[numbers], np.diff(self._offsets)[numbers]
        # Every row ends with a piece of padding, so that the pieces of all rows fill the batch without a gap.
        ends = np.cumsum(pieces + 1) - 1
        padding = np.zeros(ends[-1] + 1, bool)
        padding[ends] = True
        number_in_row = np.arange(len(padding)) - np.repeat(ends - pieces, pieces + 1)
        record = np.minimum(np.repeat(first, pieces + 1) + number_in_row, len(self._lengths) - 1)
        lengths = np.where(padding, 0, self._lengths[record])
        filled = np.add.reduceat(lengths, ends - pieces)
        lengths[ends] = R - filled
        begins = np.cumsum(lengths) - lengths
        segments = np.where(padding, 0, number_in_row + 1).astype(np.uint16)
        # 32 bits hold a place in a batch, and halve the memory that is read and written here.
        place = np.arange(B * R, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
        segment_ids = np.repeat(segments, lengths).reshape(B, R)
        tokens = np.empty(B * R, np.uint16)
        sources = np.where(padding, -1, self._begins[record]).tolist()
        for source, begin, length in zip(sources, begins.tolist(), lengths.tolist(), strict=True):
            tokens[begin : begin + length] = 0 if source < 0 else self._tokens[source : source + length]
        read, target = segment_ids[:, :-1], segment_ids[:, 1:]
        return Batch(
            tokens.reshape(B, R),
            segment_ids=np.ascontiguousarray(read),
            positions=place.reshape(B, R)[:, :-1].astype(np.uint16),
            loss_mask=(read == target) & (target > 0),
        )

    def records(self, numbers: np.ndarray) -> list[list[int]]:
        """The records of each row, in its order."""
        pieces = [self._begins[self._offsets[n] : self._offsets[n + 1]] for n in numbers.tolist()]
        return [np.searchsorted(self._records, begins).tolist() for begins in pieces]

    def digest(self) -> str:
        """A checksum of the plan."""
        plan = hashlib.sha256(self._begins.tobytes())
        plan.update(self._offsets.tobytes())
        return plan.hexdigest()


def open_rows(
    store: TokenStore, *, block_size: int, windows: Windows, seed: int, records: np.ndarray | None = None
) -> WindowRows | PackedRows:
    """The rows of a store.

    Args:
        store: where the tokens are.
        block_size: T, tokens that the model reads; a row has one more, its last target.
        windows: `starts`: windows from records that have that many tokens from their start on to the end of the
            stream, as published; `anywhere`: from every token; `packed`: whole records.
        seed: of the packing.
        records: numbers of the records to read alone, rising; windows then begin at their starts.

    Raises:
        DataError: the stream is too short for one window, or too long to be numbered.
    """
    if windows == "packed":
        chosen = np.arange(len(store)) if records is None else records
        return PackedRows(store, block_size, chosen, seed=seed)
    last = len(store.tokens) - (block_size + 1)
    starts = None
    if windows == "starts" or records is not None:
        starts = np.asarray(store.starts)
        starts = starts if records is None else starts[records]
        starts = starts[starts <= last]
    if last < 0 or (starts is not None and not len(starts)):
        which = "" if records is None else " from an under-represented record on"
        raise DataError(
            f"{store.folder}: its {len(store.tokens)} tokens are fewer than one window of {block_size + 1}{which};"
            " lower block_size or prepare more structures"
        )
    rows = WindowRows(store, block_size, starts)
    if len(rows) > _MOST_ROWS:
        raise DataError(
            f"{store.folder}: {len(rows):,} windows are more than can be numbered: set windows=starts"
        )
    return rows


def evaluation_batches(
    rows: Rows, *, batch_size: int, count: int, seed: int, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
    """The same `count` batches at every evaluation, leaves [B / hosts, ...]: a fixed random choice of rows.

    Fewer rows than asked for are all taken once. A last incomplete batch is filled with the first rows again, whose
    targets do not count: weighted by `Batch.counted` (of all hosts), the batches' mean losses give that of the rows.

    Args:
        rows: to choose from.
        batch_size: B, over all hosts.
        count: how many batches.
        seed: of the choice.
        host: number of this host, which reads its part of each batch alone.
        hosts: how many share each batch.

    Raises:
        DataError: a batch does not divide over the hosts.
    """
    if batch_size % hosts:
        raise DataError(f"a batch of {batch_size} rows does not divide over {hosts} hosts")
    share = batch_size // hosts
    chosen = min(count * batch_size, len(rows))
    needed = -(-chosen // batch_size) * batch_size
    order = np.resize(np.random.default_rng(seed).permutation(len(rows)), needed)
    for first in range(host * share, needed, batch_size):
        batch = rows.read(order[first : first + share])
        if chosen < needed:
            # It says something of the last batch alone, but all are to be compiled alike.
            mask = np.ones(batch.tokens[:, 1:].shape, bool) if batch.loss_mask is None else batch.loss_mask
            batch = batch._replace(loss_mask=mask & (np.arange(first, first + share)[:, None] < chosen))
        yield batch
