"""Which tokens are alike: cosine neighbours, and how well they follow what chemistry and geometry know."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crystallm_jax.embeddings.vectors import EmbeddingTable
from crystallm_jax.errors import DataError

_LEAST = 1e-300


class Neighbour(NamedTuple):
    """A token and the cosine of the angle between its vector and another's."""

    token: str
    cosine: float


class Agreement(NamedTuple):
    """How many tokens have a nearest neighbour of their own class.

    Attributes:
        share: of the tokens.
        chance: the share to be expected if the neighbour were any other token.
    """

    share: float
    chance: float


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; those of length 0 stay as they are."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _LEAST)


def nearest(table: EmbeddingTable, token: str, count: int = 10) -> list[Neighbour]:
    """The tokens of a table whose vectors have the largest cosines with a token's, which is left out itself.

    Raises:
        DataError: the token is not in the table.
    """
    if token not in table.tokens:
        raise DataError(f"{token!r} is not among these {len(table.tokens)} tokens ({table.kind})")
    units = unit_rows(table.vectors)
    index = table.tokens.index(token)
    cosines = units @ units[index]
    order = np.argsort(-cosines, kind="stable")
    return [Neighbour(table.tokens[i], float(cosines[i])) for i in order[order != index][:count]]


def nearest_indices(table: EmbeddingTable, count: int) -> np.ndarray:
    """Indices [N, count] of every token's neighbours, the nearest first."""
    units = unit_rows(table.vectors)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, len(units) - 1)]


def agreement(table: EmbeddingTable, classes: Sequence[str]) -> Agreement:
    """How often a token's nearest neighbour is of its class, beside chance.

    Args:
        table: of N tokens.
        classes: of each.
    """
    count = len(classes)
    same = sum(classes[i] == classes[j] for i, (j,) in enumerate(nearest_indices(table, 1).tolist()))
    pairs = sum(size * (size - 1) for size in Counter(classes).values())
    return Agreement(same / count, pairs / (count * (count - 1)))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The rank correlation of two sequences, ties at their mean rank; 0 where one of them is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    x, y = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
