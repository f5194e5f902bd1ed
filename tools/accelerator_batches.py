"""Batches of a run without grain: rows in an order that a seed gives, placed on the device ahead of the steps."""

import queue
import threading
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import NamedSharding

from crystallm_jax.data.packing import Batch
from crystallm_jax.data.rows import Rows
from crystallm_jax.train_run.train_config import TrainConfig

AHEAD = 4
_PATIENCE_S = 0.1


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def row_numbers(first: int, count: int, *, rows: int, seed: int) -> np.ndarray:
    """Numbers of the rows at places first to first + count - 1: all rows in a new order every epoch.

    Args:
        first: place of the first one, counted through all epochs.
        count: how many.
        rows: how many there are.
        seed: of the order.
    """
    epochs, places = np.divmod(np.arange(first, first + count), rows)
    return np.array([_order(seed, e, rows)[p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)])


class Batches:
    """The batches of a run on the device, a few ahead, read and copied by a thread.

    Args:
        rows: what they are made of.
        config: how many rows make one, and the seed of their order.
        first_row: place of the first row, of those that all calls together have read.
        sharding: of each leaf of a batch [A, B, ...].
    """

    def __init__(self, rows: Rows, config: TrainConfig, *, first_row: int, sharding: NamedSharding) -> None:
        self._rows = rows
        self._seed = config.seed
        self._cut = (config.gradient_accumulation_steps, config.batch_size)
        self._next_row = first_row
        self._sharding = sharding
        self._placed: queue.Queue[Batch | BaseException] = queue.Queue(AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    @property
    def rows_a_step(self) -> int:
        """How many rows a batch has."""
        return self._cut[0] * self._cut[1]

    def take(self) -> Batch:
        """The next batch."""
        found = self._placed.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _fill(self) -> None:
        while not self._ended.is_set():
            try:
                made: Batch | BaseException = self._read()
            except Exception as error:  # noqa: BLE001  raised where the batch is taken
                made = error
            while not self._ended.is_set():
                try:
                    self._placed.put(made, timeout=_PATIENCE_S)
                except queue.Full:
                    continue
                break

    def _read(self) -> Batch:
        numbers = row_numbers(self._next_row, self.rows_a_step, rows=len(self._rows), seed=self._seed)
        self._next_row += self.rows_a_step
        batch = self._rows.read(numbers)
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf.reshape(*self._cut, *leaf.shape[1:]), self._sharding), batch
        )
