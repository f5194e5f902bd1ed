"""The pool of pages: who has which, which are free, and how it grows."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.pages import Pages, PageTable, empty_pages, put_pages
from crystallm_jax.sampling.places import padded, padded_count

# Elsewhere than on a CPU the pool is one block, which grows by so much.
_GROWTH = 1.5


@jax.jit
def _gather(blocks: tuple[Pages, ...], pages: jax.Array) -> Pages:
    def of(*leaves: jax.Array) -> jax.Array:
        each = leaves[0].shape[0]
        parts = [
            jnp.take(leaf, pages - number * each, axis=0, mode="fill", fill_value=0)
            for number, leaf in enumerate(leaves)
        ]
        # What is no page of a block comes out of it as zeros; negative numbers would count from its end.
        found = [(pages >= number * each) & (pages < (number + 1) * each) for number in range(len(leaves))]
        shape = (-1, *[1] * (leaves[0].ndim - 1))
        return sum(
            (jnp.where(here.reshape(shape), part, 0) for here, part in zip(found, parts, strict=True)),
            jnp.zeros_like(parts[0]),
        )

    return jax.tree.map(of, *blocks)


class Pool:
    """Owns the pages on the device, and the book of who has them.

    Pages are given out from the first on, so that those in use lie together.

    Args:
        config: the model's shape.
        rows: of the batch.
        size: S, positions of a page.
        dtype: of keys and values.
        device: where the pages are.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        *,
        size: int,
        dtype: str,
        device: jax.Device | jax.sharding.Sharding,
    ) -> None:
        self.size = size
        self._config, self._rows, self._dtype, self._device = config, rows, dtype, device
        # Of a whole text, and some for where a page was begun before the last one was full.
        self._longest = -(-config.block_size // size) + 8
        self._in_blocks = jax.default_backend() == "cpu"
        self._block = max(4 * rows, 16)
        self.blocks: tuple[Pages, ...] = ()
        self._owner = np.zeros(0, np.int32)
        self._fill = np.zeros(0, np.int32)
        self._free: list[int] = []
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        self._grow()

    def pages_of(self, row: int) -> list[int]:
        """The row's pages, in the order of its text."""
        return self._pages[row]

    def fill_of(self, pages: list[int]) -> np.ndarray:
        """How many positions of each are taken."""
        return self._fill[pages]

    def assign(self, row: int, fills: list[int]) -> list[int]:
        """Give the row pages for so many positions each; returns them."""
        while len(self._free) < len(fills):
            self._grow()
        pages = [heapq.heappop(self._free) for _ in fills]
        self._owner[pages], self._fill[pages] = row, fills
        self._pages[row] += pages
        return pages

    def release(self, row: int) -> None:
        """Take the row's pages back."""
        for page in self._pages[row]:
            heapq.heappush(self._free, page)
        self._owner[self._pages[row]], self._fill[self._pages[row]] = self._rows, 0
        self._pages[row] = []

    def put(self, pages: Pages, source: list[int], target: list[int]) -> None:
        """Write pages [source] into the places [target]."""
        of_block = np.array(target, np.int32) // self._block
        for number in np.unique(of_block):
            chosen = of_block == number
            size = padded_count(max(int(chosen.sum()), 8))
            places = np.array(target, np.int32)[chosen] - number * self._block
            block = put_pages(
                self.blocks[number],
                pages,
                padded(np.array(source, np.int32)[chosen], size, fill=0),
                padded(places, size, fill=self._block),
            )
            self.blocks = (*self.blocks[:number], block, *self.blocks[number + 1 :])

    def gather(self, pages: list[int], size: int) -> Pages:
        """A copy of pages, with others after them up to `size`."""
        return _gather(self.blocks, padded(np.array(pages, np.int32), size, fill=0))

    def table(self) -> PageTable:
        """The book, on the device."""
        width = self._longest
        while max(map(len, self._pages)) > width:
            width *= 2
        self._longest = width
        pages = np.full((self._rows, width), len(self._owner), np.int32)
        for row, own in enumerate(self._pages):
            pages[row, : len(own)] = own
        used = np.flatnonzero(self._owner < self._rows)
        blocks = int(used[-1]) // self._block + 1 if len(used) else 0
        book = PageTable(self._owner, self._fill, pages, np.int32(blocks))
        return jax.device_put(book, self._device) if isinstance(self._device, jax.Device) else book

    def _grow(self) -> None:
        """More free pages: as many blocks again, or, as one block, half as many pages again."""
        before = len(self._owner)
        if self._in_blocks:
            count = max(len(self.blocks), 2)
            self.blocks += tuple(self._new(self._block) for _ in range(count))
            after = before + count * self._block
        elif not self.blocks:
            after = self._block
            self.blocks = (self._new(after),)
        else:
            after = self._block = int(before * _GROWTH)
            extra = after - before
            self.blocks = (
                jax.tree.map(
                    lambda leaf: jnp.pad(leaf, [(0, extra), *[(0, 0)] * (leaf.ndim - 1)]), self.blocks[0]
                ),
            )
        self._owner = np.concatenate([self._owner, np.full(after - before, self._rows, np.int32)])
        self._fill = np.concatenate([self._fill, np.zeros(after - before, np.int32)])
        for page in range(before, after):
            heapq.heappush(self._free, page)

    def _new(self, count: int) -> Pages:
        return jax.device_put(empty_pages(self._config, count, self.size, self._dtype), self._device)
