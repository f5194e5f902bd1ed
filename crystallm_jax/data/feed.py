"""From a token store to batches: a grain pipeline of windows that begin at CIF starts.

The order depends on the seed and the epoch alone: batch n of a run is the same rows whatever the number of hosts
or threads. Each host reads its own rows of every batch.
"""

from collections.abc import Iterator
from typing import SupportsIndex

import grain
import numpy as np

from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError

# Reading threads a host: a memory-mapped slice costs microseconds, more threads only contend.
READ_THREADS = 2
BATCHES_AHEAD = 16


def window_starts(store: TokenStore, block_size: int, windows: str) -> np.ndarray:
    """Offsets at which a window of `block_size` + 1 tokens may begin, int64.

    Args:
        store: where the tokens are.
        block_size: tokens that the model reads; one more is its last target.
        windows: `starts`, at records that have that many tokens from their start on to the end of the stream, as
            published; or `anywhere`.

    Raises:
        DataError: the stream is too short for one window.
    """
    last = len(store.tokens) - (block_size + 1)
    if last < 0:
        raise DataError(
            f"{store.folder}: its {len(store.tokens)} tokens are fewer than one window of {block_size + 1};"
            " lower block_size or prepare more structures"
        )
    if windows == "anywhere":
        return np.arange(last + 1, dtype=np.int64)
    starts = np.asarray(store.starts)
    return starts[starts <= last]


class TokenWindows:
    """Windows of a token store as a random-access source of uint16 [T + 1]."""

    def __init__(self, store: TokenStore, block_size: int, windows: str = "starts") -> None:
        self._tokens = store.tokens
        self._length = block_size + 1
        self._starts = window_starts(store, block_size, windows)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        start = self._starts[index]
        return np.asarray(self._tokens[start : start + self._length])


class HostRows:
    """The rows of an endless sequence of global batches that one of several hosts reads."""

    def __init__(self, rows: grain.MapDataset, *, batch_size: int, host: int, hosts: int) -> None:
        if batch_size % hosts:
            raise DataError(f"a batch of {batch_size} rows does not divide over {hosts} hosts")
        self._rows = rows
        self._batch_size = batch_size
        self._share = batch_size // hosts
        self._offset = host * self._share

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size * self._share

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        batch, row = divmod(int(index), self._share)
        return self._rows[batch * self._batch_size + self._offset + row]


def train_batches(
    store: TokenStore,
    *,
    block_size: int,
    windows: str,
    batch_size: int,
    micro_batches: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of shuffled batches, uint16 [A, B, T + 1], reshuffled every epoch.

    A is `micro_batches`, B this host's share of `batch_size`, T `block_size`. Its `get_state()` is a small dict that
    JSON can hold; `set_state` continues exactly there. Call `close()` when done.
    """
    rows = grain.MapDataset.source(TokenWindows(store, block_size, windows)).seed(seed).shuffle().repeat()
    share = HostRows(rows, batch_size=batch_size, host=host, hosts=hosts)
    batches = grain.MapDataset.source(share).batch(batch_size // hosts, drop_remainder=True)
    steps = batches.batch(micro_batches, drop_remainder=True)
    return iter(
        steps.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD))
    )


def evaluation_batches(
    store: TokenStore, *, block_size: int, windows: str, batch_size: int, count: int, seed: int
) -> Iterator[np.ndarray]:
    """The same `count` batches at every evaluation, uint16 [batch_size, block_size + 1]: a fixed random choice.

    Fewer windows than asked for are all taken once; a last incomplete batch is filled with the first rows again.
    """
    source = TokenWindows(store, block_size, windows)
    order = np.random.default_rng(seed).permutation(len(source))
    needed = min(count * batch_size, -(-len(order) // batch_size) * batch_size)
    order = np.resize(order, needed)
    for first in range(0, needed, batch_size):
        yield np.stack([source[i] for i in order[first : first + batch_size]])
