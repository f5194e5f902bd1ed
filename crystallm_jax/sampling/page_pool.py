"""The pool of pages: who has which, which are free, and how it grows."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.pages import Pages, PageTable, empty_pages, put_pages
from crystallm_jax.sampling.devices import Placement
from crystallm_jax.sampling.shapes import padded, padded_count, padded_rows

# On a CPU the pool is several blocks, of which a step reads those in use: small ones first, so that it reads few pages
# that nobody has. They hold whole contexts of all rows, up to so much memory; then as many are added again. Few pages
# take fewer blocks, since each lengthens compilation.
# Elsewhere it is one block, all of which is read: it begins with so many positions a row and grows by so much.
_SHARES = (1, 1, 1, 1, 2, 2, 4, 4)
_MOST_BYTES = 2**30
_FEWEST_PAGES = 32
_BEGINNING, _GROWTH = 256, 1.5


def pages_of_longest(config: ModelConfig, size: int) -> int:
    """Pages that a text of the whole context has, and some for where one was begun before the last was full."""
    return -(-config.block_size // size) + 16


class Pool:
    """Owns the pages on the device, and the book of who has them.

    Pages are given out from the first on, so that those in use lie together.

    Args:
        config: the model's shape.
        rows: of the batch.
        size: S, positions of a page.
        dtype: of keys and values.
        placement: where the pages are.
        longest: tokens of the longest text to come; None takes the context.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        *,
        size: int,
        dtype: str,
        placement: Placement,
        longest: int | None = None,
    ) -> None:
        self.size = size
        self._config, self._rows, self._dtype, self._placement = config, rows, dtype, placement
        self._longest = pages_of_longest(config, size)
        self._wanted = rows * (-(-(longest or config.block_size) // size) + 1)
        self._in_blocks = placement.platform == "cpu"
        self.blocks: tuple[Pages, ...] = ()
        # Where each block's pages begin, and where the last one's end.
        self._begins = np.zeros(1, np.int64)
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

    def cut(self, row: int, positions: int) -> None:
        """Leave the row its first positions; pages beyond are free again."""
        pages = self._pages[row]
        begins = np.cumsum([0, *self._fill[pages]])[:-1]
        kept = int(np.searchsorted(begins, positions))
        if kept:
            last = pages[kept - 1]
            self._fill[last] = min(self._fill[last], positions - begins[kept - 1])
        for page in pages[kept:]:
            heapq.heappush(self._free, page)
        self._owner[pages[kept:]], self._fill[pages[kept:]] = self._rows, 0
        self._pages[row] = pages[:kept]

    def release(self, row: int) -> None:
        """Take the row's pages back."""
        self.cut(row, 0)

    def put(self, pages: Pages, source: list[int], target: list[int]) -> None:
        """Write pages [source] into the places [target]."""
        for number, chosen, places in self._by_block(target):
            block = _copied(self.blocks[number], pages, source=np.array(source)[chosen], target=places)
            self.blocks = (*self.blocks[:number], block, *self.blocks[number + 1 :])

    def copy(self, row: int, others: Sequence[int]) -> None:
        """Give other rows pages of what the row's hold."""
        pages = self._pages[row]
        if not pages:
            return
        held = self.gather(pages, padded_count(len(pages)))
        targets = [page for other in others for page in self.assign(other, self._fill[pages].tolist())]
        self.put(held, [*range(len(pages))] * len(others), targets)

    def gather(self, pages: list[int], size: int) -> Pages:
        """A copy of pages, with empty ones after them up to `size`."""
        copy = self._new(size)
        for number, chosen, places in self._by_block(pages):
            copy = _copied(copy, self.blocks[number], source=places, target=np.flatnonzero(chosen))
        return copy

    def _by_block(self, pages: list[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each block that some of the pages are in, which they are (bool), and their places in it."""
        numbers = np.searchsorted(self._begins, pages, side="right") - 1
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            yield number, chosen, np.array(pages)[chosen] - self._begins[number]

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
        blocks = int(np.searchsorted(self._begins, used[-1], side="right")) if len(used) else 0
        book = PageTable(self._owner, self._fill, pages, np.array(blocks, np.int32))
        return jax.device_put(book, self._placement.whole)

    def _grow(self) -> None:
        """More free pages: more blocks, or, as one block, half as many pages again."""
        before = len(self._owner)
        if self._in_blocks:
            unit = self._unit()
            begins = (0, *accumulate(unit * share for share in _SHARES))
            self.blocks += tuple(
                self._new(share * unit)
                for share, begin in zip(_SHARES, begins, strict=False)
                if begin < self._wanted
            )
        elif not self.blocks:
            self.blocks = (self._new(max(min(_BEGINNING // self.size * self._rows, self._wanted), 16)),)
        else:
            self.blocks = (_lengthened(self.blocks[0], int(before * (_GROWTH - 1))),)
        self._begins = np.cumsum([0, *(len(block.keys[0]) for block in self.blocks)])
        after = int(self._begins[-1])
        self._owner = np.concatenate([self._owner, np.full(after - before, self._rows, np.int32)])
        self._fill = np.concatenate([self._fill, np.zeros(after - before, np.int32)])
        for page in range(before, after):
            heapq.heappush(self._free, page)

    def _unit(self) -> int:
        """Pages of the smallest block."""
        config, parts = self._config, sum(_SHARES)
        wanted = self._wanted
        page_bytes = 2 * config.n_layer * config.n_embd * self.size * jnp.dtype(self._dtype).itemsize
        return max(
            -(-wanted // parts) if wanted * page_bytes < _MOST_BYTES else _MOST_BYTES // page_bytes // parts,
            _FEWEST_PAGES,
        )

    def _new(self, count: int) -> Pages:
        return self._placement.made_by_heads(empty_pages, self._config, count, self.size, self._dtype)


def _lengthened(block: Pages, extra: int) -> Pages:
    """The block with empty pages after it; one array after the other, each in the place of the old one."""

    def longer(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, done = list(leaves), []
        while rest:
            leaf = rest.pop(0)
            done.append(jnp.pad(leaf, [(0, extra), *[(0, 0)] * (leaf.ndim - 1)]))
            leaf.delete()
        return tuple(done)

    return Pages(longer(block.keys), longer(block.values))


def _copied(into: Pages, pages: Pages, *, source: np.ndarray, target: np.ndarray) -> Pages:
    """Pages `into`, which are donated, with pages [source] in the places [target]."""
    size = padded_rows(len(source))
    beyond = len(into.keys[0])
    return put_pages(
        into,
        pages,
        padded(source.astype(np.int32), size, fill=0),
        padded(target.astype(np.int32), size, fill=beyond),
    )
