"""Reading many tokens at once: several texts side by side, in few shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from crystallm_jax.model.columns import Before
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Weights
from crystallm_jax.sampling.decode import NO_TOKEN, Columns, Reading, read_texts
from crystallm_jax.sampling.places import padded_count
from crystallm_jax.sampling.pool import Pool

# Columns are read in these sizes, each compiled once; texts are packed into one reading up to the greatest but one
# that is longer stands alone.
_SMALLEST, _MOST = 32, 256
# Texts in one reading at most, where something stands before them: each column is compared with all that does.
_MOST_GOING_ON = 8


class Piece(NamedTuple):
    """Tokens to read.

    Attributes:
        tokens: int [T].
        start: position of the first.
        scored: how many of them, from the end, count for the log-probability.
        row: whose pages stand before them; None where the text begins here.
    """

    tokens: np.ndarray
    start: int
    scored: int
    row: int | None


@dataclass(frozen=True, eq=False)
class Read:
    """A piece that was read.

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


def read_pieces(
    config: ModelConfig, weights: Weights, pieces: Sequence[Piece], *, pool: Pool, dtype: str
) -> list[Read]:
    """Read pieces, packed into as few readings as their sizes allow."""
    results: list[Read] = []
    group: list[Piece] = []
    for piece in pieces:
        most = len(group) == _MOST_GOING_ON if piece.row is not None else False
        if group and (most or sum(len(one.tokens) for one in group) + len(piece.tokens) > _MOST):
            results += _read_group(config, weights, group, pool=pool, dtype=dtype)
            group = []
        group.append(piece)
    return results + (_read_group(config, weights, group, pool=pool, dtype=dtype) if group else [])


def _read_group(
    config: ModelConfig, weights: Weights, group: Sequence[Piece], *, pool: Pool, dtype: str
) -> list[Read]:
    S = pool.size
    size = max(padded_count(sum(len(piece.tokens) for piece in group)), _SMALLEST)
    texts = _SMALLEST if group[0].row is None else _MOST_GOING_ON
    while texts < len(group):
        texts *= 2
    # As many for a short reading as for a long one: what takes them is compiled for their number.
    pages = np.zeros((max(size, _MOST) // S + texts, S), np.int32)
    token, position = np.zeros(size, np.int32), np.zeros(size, np.int32)
    text, target = np.full(size, texts, np.int32), np.full(size, NO_TOKEN, np.int32)
    last = np.zeros(texts, np.int32)
    column = page = 0
    parts: list[tuple[list[int], list[int]]] = []
    for number, piece in enumerate(group):
        T = len(piece.tokens)
        here = slice(column, column + T)
        token[here], text[here] = piece.tokens, number
        # What follows a full context can be appended, but not read: what is read there in its stead is not used.
        position[here] = np.minimum(piece.start + np.arange(T), config.block_size - 1)
        counted = slice(column + max(T - piece.scored - 1, 0), column + T - 1)
        target[counted] = token[counted.start + 1 : column + T]
        last[number] = column + T - 1
        count = -(-T // S)
        places = np.arange(count * S) + column
        pages[page : page + count] = np.minimum(places, size - 1).reshape(count, S)
        parts.append((list(range(page, page + count)), [min(S, T - first) for first in range(0, T, S)]))
        column, page = column + T, page + count
    columns = Columns(*map(jnp.asarray, (token, position, text, target, pages, last)))
    reading = read_texts(config, dtype, weights=weights, columns=columns, before=_before(group, pool))
    return [Read(reading, number, *part) for number, part in enumerate(parts)]


def _before(group: Sequence[Piece], pool: Pool) -> Before | None:
    """What stands before the pieces, in a few sizes."""
    if group[0].row is None:
        return None
    pages = [page for piece in group if piece.row is not None for page in pool.pages_of(piece.row)]
    whose = [
        number
        for number, piece in enumerate(group)
        if piece.row is not None
        for _ in pool.pages_of(piece.row)
    ]
    size = max(padded_count(len(pages)), 4 * pool.size)
    fill, text = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    fill[: len(pages)], text[: len(pages)] = pool.fill_of(pages), whose
    return Before(pool.gather(pages, size), fill, text)
