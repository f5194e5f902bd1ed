"""Batches on the devices before they are needed."""

import time
from typing import Any

import jax
from jax.sharding import NamedSharding

from crystallm_jax.data.feed import Feed
from crystallm_jax.data.packing import Batch


class PlacedBatches:
    """The batches of a feed on the devices, one ahead: while a step runs on one, the next is read and copied.

    Args:
        feed: where they come from; its state is set before.
        sharding: of each leaf of a batch [A, B, ...].
    """

    def __init__(self, feed: Feed, sharding: NamedSharding) -> None:
        self._feed = feed
        self._sharding = sharding
        self._taken_state = feed.get_state()
        self._next_state = self._taken_state
        self._next: Batch | None = None
        self._waited = 0.0

    def take(self) -> Batch:
        """The next batch; call `prefetch` once the step on it is dispatched."""
        batch = self._next or self._placed()
        self._next = None
        self._taken_state = self._next_state
        return batch

    def prefetch(self) -> None:
        """Read the batch after the one taken and start copying it."""
        self._next = self._placed()

    def _placed(self) -> Batch:
        begun = time.perf_counter()
        batch = next(self._feed)
        self._waited += time.perf_counter() - begun
        self._next_state = self._feed.get_state()
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self._sharding, leaf), batch)

    def get_state(self) -> dict[str, Any]:
        """Where the feed stands after the batches that were taken, for a checkpoint."""
        return self._taken_state

    def take_waited(self) -> float:
        """Seconds spent waiting for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited
