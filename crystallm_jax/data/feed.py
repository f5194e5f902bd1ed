"""From a token store to batches: rows of tokens, a grain pipeline that shuffles and reads them, and where it stands.

The order depends on the seed and the epoch alone: batch n of a run is the same rows whatever the number of hosts
or threads, and the batch size only says where the sequence of rows is cut. Each host reads its own rows of every
batch, so a run may go on with another number of hosts.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

import grain
import numpy as np
from grain.experimental import index_shuffle

from crystallm_jax.data.packing import Batch, Windows
from crystallm_jax.data.rows import PackedRows, Rows, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError

# Threads read ahead, never processes: grain's state does not say how many processes made it, and with another
# number of them it goes on with other data. How many threads there are changes nothing.
READ_THREADS = 2
_STEPS_AHEAD = 16
_BYTES_AHEAD = 1 << 27
# Micro-batches among which a fixed number are under-represented ones, at places drawn anew in each such block.
_MIXED = 1000
# As grain's own shuffle.
_ROUNDS = 4
# Numbers of a sequence that go into its checksum: a library that draws otherwise shows in these already.
_SAMPLED = 16
# Of a checksum, in a message.
_SHOWN_DIGITS = 12
_MENDS = {
    "dataset": "give the folder that it was trained on, as it was",
    "order": "give that folder as it was and install the numpy and grain that the checkpoint's description names",
}

logger = logging.getLogger(__name__)


class _Shuffled:
    """Rows in the order in which they are read, endlessly: shuffled anew every epoch.

    These are the numbers that `MapDataset.range(len(rows)).seed(seed).shuffle().repeat()` gives, from the same function
    of grain without a call through each layer for every row, which took longer than the reading.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows = rows
        self._count = len(rows)
        self._seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Numbers of the rows at places first to first + count - 1 of the order, int64 [count]."""
        found = []
        for place in range(first, first + count):
            epoch, index = divmod(place, self._count)
            seed = (self._seed + epoch) % (1 << 32)
            found.append(index_shuffle(index, max_index=self._count - 1, seed=seed, rounds=_ROUNDS))
        return np.array(found)

    def read(self, first: int, count: int) -> Batch:
        return self.rows.read(self.numbers(first, count))

    def records(self, first: int, count: int) -> list[list[int]]:
        return self.rows.records(self.numbers(first, count))


class _Mixture:
    """Which micro-batches are made of under-represented records.

    Of every 1,000 micro-batches p × 1,000 are, at places that the seed draws. So any one is with probability p, the
    share holds exactly, and how many came before is known without counting: no row of either kind is passed over.
    """

    def __init__(self, p: float, seed: int) -> None:
        self._p = p
        self._seed = seed

    def place(self, number: int) -> tuple[bool, int]:
        """Whether micro-batch `number` is one, and how many of the same kind come before it."""
        block, place = divmod(number, _MIXED)
        before = self._rare_before(block)
        drawn = np.random.default_rng((self._seed, block)).permutation(_MIXED)
        places = drawn[: self._rare_before(block + 1) - before]
        rare = before + int(np.count_nonzero(places < place))
        return (True, rare) if place in places else (False, number - rare)

    def _rare_before(self, block: int) -> int:
        return int(self._p * _MIXED * block)


class _Steps:
    """This host's part of every step: a random-access source of Batch, leaves [A, B / hosts, ...]."""

    def __init__(
        self,
        common: _Shuffled,
        rare: _Shuffled | None,
        mixture: _Mixture,
        *,
        batch_size: int,
        micro_batches: int,
        host: int,
        hosts: int,
    ) -> None:
        self._common = common
        self._rare = rare
        self._mixture = mixture
        self._batch_size = batch_size
        self._micro_batches = micro_batches
        self._share = batch_size // hosts
        self._offset = host * self._share

    def __len__(self) -> int:
        return sys.maxsize // (self._batch_size * self._micro_batches)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        first = int(index) * self._micro_batches
        parts = [self._micro_batch(number) for number in range(first, first + self._micro_batches)]
        leaves: list[Any] = [
            None if of_parts[0] is None else np.stack(of_parts) for of_parts in zip(*parts, strict=True)
        ]
        return Batch(*leaves)

    def records(self, index: int) -> list[list[list[int]]]:
        """Numbers of the records of a step, by micro-batch and row: those of all hosts."""
        first = index * self._micro_batches
        parts = [self._source(number) for number in range(first, first + self._micro_batches)]
        return [source.records(number * self._batch_size, self._batch_size) for source, number in parts]

    def _micro_batch(self, number: int) -> Batch:
        source, number = self._source(number)
        return source.read(number * self._batch_size + self._offset, self._share)

    def _source(self, number: int) -> tuple[_Shuffled, int]:
        """What a micro-batch is made of, and how many such micro-batches come before it."""
        if self._rare is None:
            return self._common, number
        is_rare, number = self._mixture.place(number)
        return (self._rare if is_rare else self._common), number


class Feed:
    """An endless iterator of shuffled batches that knows where it stands; it owns reading threads: close it.

    Yields Batch with leaves [A, B, ...]: A micro-batches a step, B this host's share of the batch size.
    """

    def __init__(self, steps: _Steps, fingerprint: Mapping[str, Any], store: TokenStore) -> None:
        self._fingerprint = dict(fingerprint)
        self._source = steps
        self._store = store
        size = sum(leaf.nbytes for leaf in steps[0] if leaf is not None)
        ahead = max(2, min(_STEPS_AHEAD, _BYTES_AHEAD // size))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=ahead)
        self._steps = iter(grain.MapDataset.source(steps).to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._steps)

    def get_state(self) -> dict[str, Any]:
        """The place in the sequence of steps and what the sequence depends on: small, for JSON, alike on all hosts."""
        return {**self._steps.get_state(), "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another feed stood.

        Raises:
            DataError: the other's batches would have been others.
        """
        saved = state.get("fingerprint")
        if saved is None:
            # Earlier versions wrote none; they knew windows alone and read them in the order of today.
            windows = "starts" if self._fingerprint["windows"] == "packed" else self._fingerprint["windows"]
            saved = {**self._fingerprint, "windows": windows, "underrep_p": 0.0}
            logger.warning("the checkpoint does not say what its data was: taken to be that of this run")
        for key, value in self._fingerprint.items():
            if saved.get(key) != value:
                raise DataError(
                    f"the run has read its data with {key}={_shown(saved.get(key))}, now {key}={_shown(value)}"
                    f" would give other batches: {_MENDS.get(key, f'set {key} back')}, or begin a new run with"
                    " init_from=RUN_FOLDER"
                )
        self.go_to(state["next_index"])

    def go_to(self, step: int) -> None:
        """Go on with the batches after those of the first `step` steps."""
        self._steps.set_state({"next_index": step})

    def record_ids(self, step: int) -> list[list[list[str]]]:
        """Ids of the records that step `step` of a run reads, counted from 1: by micro-batch and row, of all hosts.

        Raises:
            DataError: the list of ids is missing or damaged.
        """
        ids = self._store.ids
        records = self._source.records(step - 1)
        return [[[ids[number] for number in row] for row in micro_batch] for micro_batch in records]

    def close(self) -> None:
        """End the threads."""
        self._steps.close()


def _shown(value: Any) -> Any:
    """A setting in a message: of a checksum the first digits."""
    is_checksum = isinstance(value, str) and len(value) > _SHOWN_DIGITS and " " not in value
    return f"{value[:_SHOWN_DIGITS]}…" if is_checksum else value


def open_feed(
    store: TokenStore,
    *,
    block_size: int,
    windows: Windows,
    batch_size: int,
    micro_batches: int,
    seed: int,
    underrep_p: float = 0.0,
    host: int = 0,
    hosts: int = 1,
) -> Feed:
    """The training batches of a store.

    Args:
        store: where the tokens are.
        block_size: T, tokens that the model reads.
        windows: as for `open_rows`.
        batch_size: rows of a micro-batch, over all hosts.
        micro_batches: A, micro-batches of a step.
        seed: of the order, the packing and the mixture.
        underrep_p: the share of micro-batches that are made of under-represented records alone, as published; where
            these are few they repeat.
        host: number of this host.
        hosts: how many share each batch.

    Raises:
        DataError: rows that cannot be made, a batch that does not divide over the hosts, or no under-represented
            records where some are asked for.
    """
    if batch_size % hosts:
        raise DataError(f"a batch of {batch_size} rows does not divide over {hosts} hosts")
    rows = open_rows(store, block_size=block_size, windows=windows, seed=seed)
    if isinstance(rows, PackedRows) and rows.truncated:
        logger.warning(
            "%s: %d of %d records are longer than block_size=%d: their first %d tokens are read",
            store.folder,
            rows.truncated,
            len(store),
            block_size,
            block_size + 1,
        )
    common, rare, mixture = _Shuffled(rows, seed), None, _Mixture(underrep_p, seed)
    order = [rows.digest(), common.numbers(0, _SAMPLED).tolist()]
    if underrep_p > 0:
        marked = np.searchsorted(np.asarray(store.starts), store.underrepresented)
        rare = _Shuffled(
            open_rows(store, block_size=block_size, windows=windows, seed=seed, records=marked), seed
        )
        order += [rare.rows.digest(), [mixture.place(i) for i in range(_SAMPLED)]]
    summary = store.header.splits[store.split]
    fingerprint = {
        "dataset": summary.sha256 or f"{summary.tokens} tokens",
        "windows": windows,
        "seed": seed,
        "block_size": block_size,
        "batch_size": batch_size,
        "gradient_accumulation_steps": micro_batches,
        "underrep_p": float(underrep_p),
        "order": hashlib.sha256(repr(order).encode()).hexdigest()[:16],
    }
    steps = _Steps(
        common, rare, mixture, batch_size=batch_size, micro_batches=micro_batches, host=host, hosts=hosts
    )
    return Feed(steps, fingerprint, store)
