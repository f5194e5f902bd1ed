"""Reading many tokens at once: several texts side by side, in few shapes, for their pages and their probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.model.columns import attend_columns
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Weights, read_columns
from crystallm_jax.model.pages import Pages, column_pages
from crystallm_jax.sampling.shapes import padded_count

# Columns are read in these sizes, each compiled once; texts are packed into one reading up to the greatest, but one
# that is longer stands alone.
_SMALLEST, _MOST = 32, 256
_TEXTS = 32
# Texts whose reading is kept for further samples of them.
_KEPT = 16


class Columns(NamedTuple):
    """Tokens of R texts to read at once: of each all but its last.

    Attributes:
        token: int32 [N].
        target: int32 [N]; the token that follows.
        position: int32 [N].
        text: int32 [N]; which of the texts each is of; R for filling.
        page: int32 [P, S]; the columns of each page to make.
        first: int32 [R]; the first column of each text.
    """

    token: jax.Array | np.ndarray
    target: jax.Array | np.ndarray
    position: jax.Array | np.ndarray
    text: jax.Array | np.ndarray
    page: jax.Array | np.ndarray
    first: jax.Array | np.ndarray


class Reading(NamedTuple):
    """What was read.

    Attributes:
        pages: keys and values, as `Columns.page` has it.
        log_probs: float32 [R, W]; of each text's tokens but the first, in nats; anything beyond its end.
    """

    pages: Pages
    log_probs: jax.Array


@dataclass(frozen=True, eq=False)
class Read:
    """A text that was read, but for its last token.

    Attributes:
        reading: that it was read in.
        number: which of the reading's texts it is.
        pages: its pages in the reading.
        fills: how many positions of each are taken.
    """

    reading: Reading
    number: int
    pages: list[int]
    fills: list[int]


class Reader:
    """Reads texts and keeps the newest readings, so that the samples of one prompt share one.

    Args:
        config: the model's shape.
        weights: as prepared.
        page: S, positions of a page.
        dtype: of keys and values.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, page: int, dtype: str) -> None:
        self._config, self._weights, self._page, self._dtype = config, weights, page, dtype
        self._known: dict[bytes, Read] = {}

    def read(self, texts: Sequence[np.ndarray]) -> list[Read]:
        """Each text's reading, made once for all that are equal; texts are as `read_texts` takes them."""
        names = [text.tobytes() for text in texts]
        found = {name: self._known[name] for name in names if name in self._known}
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in found}
        made = read_texts(self._config, self._weights, list(new.values()), page=self._page, dtype=self._dtype)
        found |= dict(zip(new, chain.from_iterable(made), strict=True))
        self._known = dict([*self._known.items(), *found.items()][-_KEPT:])
        return [found[name] for name in names]


def by_reading(reads: Sequence[Read]) -> list[list[int]]:
    """Numbers of the texts that were read together."""
    groups: dict[int, list[int]] = {}
    for number, read in enumerate(reads):
        groups.setdefault(id(read.reading), []).append(number)
    return list(groups.values())


def read_texts(
    config: ModelConfig,
    weights: Weights,
    texts: Sequence[np.ndarray],
    *,
    page: int,
    dtype: str,
    most: int = _MOST,
) -> Iterator[list[Read]]:
    """Read all tokens but the last of each text, packed into as few readings as their sizes allow.

    Args:
        config: the model's shape.
        weights: as prepared.
        texts: int [T] each, of at least one token, at most one more than the context.
        page: S, positions of a page.
        dtype: of keys and values.
        most: tokens of a reading, but for one of a single text that is longer.

    Yields:
        Neighbours that were read together, in the order of the texts.
    """
    for group in _groups(texts, most):
        yield _read(config, weights, group, page=page, dtype=dtype)


def _groups(texts: Sequence[np.ndarray], most: int) -> Iterator[Sequence[np.ndarray]]:
    first = tokens = 0
    for number, text in enumerate(texts):
        if number > first and (tokens + len(text) - 1 > most or number - first == _TEXTS):
            yield texts[first:number]
            first, tokens = number, 0
        tokens += len(text) - 1
    if len(texts):
        yield texts[first:]


def _read(
    config: ModelConfig, weights: Weights, texts: Sequence[np.ndarray], *, page: int, dtype: str
) -> list[Read]:
    counts = [len(text) - 1 for text in texts]
    size = max(padded_count(sum(counts)), _SMALLEST)
    token, target, position = (np.zeros(size, np.int32) for _ in range(3))
    whose = np.full(size, _TEXTS, np.int32)
    # As many for a short reading as for a long one: what takes them is compiled for their number.
    pages = np.zeros((max(size, _MOST) // page + _TEXTS, page), np.int32)
    firsts = np.zeros(_TEXTS, np.int32)
    firsts[: len(texts)] = np.cumsum([0, *counts[:-1]])
    made = 0
    parts: list[tuple[list[int], list[int]]] = []
    for number, (text, count, first) in enumerate(zip(texts, counts, firsts, strict=False)):
        here = slice(first, first + count)
        token[here], target[here], position[here], whose[here] = text[:-1], text[1:], np.arange(count), number
        own = -(-count // page)
        places = np.arange(own * page) + first
        pages[made : made + own] = np.minimum(places, size - 1).reshape(own, page)
        parts.append((list(range(made, made + own)), [min(page, count - n) for n in range(0, count, page)]))
        made += own
    columns = Columns(token, target, position, whose, pages, firsts)
    reading = _read_columns(config, dtype, weights=weights, columns=columns)
    return [Read(reading, number, *part) for number, part in enumerate(parts)]


@partial(jax.jit, static_argnames=("config", "dtype"))
def _read_columns(config: ModelConfig, dtype: str, *, weights: Weights, columns: Columns) -> Reading:
    """Read columns. Compiled once a shape."""
    keys, values = [], []
    text = jnp.asarray(columns.text)

    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_keys, of_values = column_pages(k.astype(dtype), v.astype(dtype), jnp.asarray(columns.page))
        keys.append(of_keys)
        values.append(of_values)
        return attend_columns(q, k, v, text=text)

    logits = read_columns(
        config, weights, jnp.asarray(columns.token), jnp.asarray(columns.position), attend=attend
    )
    targets = jnp.asarray(columns.target)[:, None]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[:, 0]
    # Token i of a text is the target of its column i - 1.
    places = jnp.asarray(columns.first)[:, None] + np.arange(-1, config.block_size)
    return Reading(Pages(tuple(keys), tuple(values)), jnp.take(log_probs, places, mode="clip"))
