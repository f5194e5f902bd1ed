"""The key-value cache: pages of a pool, of which a step reads those in use and no others.

    P pages of a block    S positions of a page    G blocks    B rows    N pages of the longest row

A page holds keys and values of up to S tokens of one row. What a step reads is therefore what the rows' lengths add up
to, not their number times the longest. Keys and values of the tokens of the last few steps stand in a log that all rows
write at the same place; it becomes a page of each row when it is full. Keys lie with their positions innermost: scores
are then sums over an outer axis, which vectorises everywhere.

The pool is a tuple of blocks, so that it can grow without a copy and a CPU can pass over blocks that nobody uses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.model.config import ModelConfig

# A score that weighs nothing; finite, so that pages without any token stay free of NaN.
_NOTHING = -1e30
_SLICE = 32


class Pages(NamedTuple):
    """Some pages: a block of the pool, or pages on their way there.

    Attributes:
        keys: one array a layer, [P, H, d, S].
        values: one array a layer, [P, H, S, d].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Log(NamedTuple):
    """Keys and values of the newest tokens: one array a layer each, [S, H, d, B]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageTable:
    """Whose the pages are.

    Attributes:
        owner: int32, for the pages of all blocks; the row of each, B where it is free.
        fill: int32, likewise; how many of its positions are taken, from the first on.
        pages: int32 [B, N]; each row's pages in the order of its text, as many as there are where there are no more.
        blocks: int32 []; blocks beyond the last one in use may be passed over.
    """

    owner: jax.Array | np.ndarray
    fill: jax.Array | np.ndarray
    pages: jax.Array | np.ndarray
    blocks: jax.Array | np.ndarray


def empty_pages(config: ModelConfig, count: int, size: int, dtype: str) -> Pages:
    """So many pages of `size` positions."""
    H, d = config.n_head, config.head_dim
    return Pages(
        tuple(jnp.zeros((count, H, d, size), dtype) for _ in range(config.n_layer)),
        tuple(jnp.zeros((count, H, size, d), dtype) for _ in range(config.n_layer)),
    )


def empty_log(config: ModelConfig, rows: int, size: int, dtype: str) -> Log:
    """A log of `size` steps for `rows` rows."""
    shape = (size, config.n_head, config.head_dim, rows)
    layers = tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer))
    return Log(layers, tuple(jnp.zeros_like(layer) for layer in layers))


def log_pages(log: Log) -> Pages:
    """The log as a page for each row."""
    return Pages(
        tuple(layer.transpose(3, 1, 2, 0) for layer in log.keys),
        tuple(layer.transpose(3, 1, 0, 2) for layer in log.values),
    )


def column_pages(
    keys_HdN: jax.Array, values_HdN: jax.Array, columns: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pages [P, H, d, S] and [P, H, S, d] of columns [P, S] of keys and values [H, d, N]."""
    keys = jnp.take(keys_HdN, columns, axis=2)
    values = jnp.take(values_HdN, columns, axis=2)
    return keys.transpose(2, 0, 1, 3), values.transpose(2, 0, 3, 1)


@partial(jax.jit, donate_argnums=0)
def put_pages(block: Pages, pages: Pages, source: jax.Array, target: jax.Array) -> Pages:
    """The block with pages [source] in the places [target]; places beyond its end are left out. It is donated."""

    def put(into: jax.Array, of: jax.Array) -> jax.Array:
        return into.at[target].set(of[source].astype(into.dtype), mode="drop")

    return jax.tree.map(put, block, pages)


def attend_pages(
    q_HdB: jax.Array,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    log_keys: jax.Array,
    log_values: jax.Array,
    *,
    table: PageTable,
    newest: jax.Array,
) -> jax.Array:
    """One layer's attention of one token a row to all that its row has read, float32 [H, d, B].

    Softmax and sums in float32. A row's result depends on its own pages alone, summed in the order of its text where
    the platform is no CPU.

    Args:
        q_HdB: queries.
        keys: of each block, [P, H, d, S].
        values: of each block, [P, H, S, d].
        log_keys: [S, H, d, B].
        log_values: [S, H, d, B].
        table: whose the pages are.
        newest: the log's newest step.
    """
    q_HdB = q_HdB.astype(jnp.float32) / math.sqrt(q_HdB.shape[1])
    with jax.named_scope("log"):
        seen = (jnp.arange(log_keys.shape[0]) <= newest)[:, None, None]
        log_scores = jnp.where(seen, _sum_products(log_keys, q_HdB[None], axis=2), _NOTHING)
    if not keys:
        weights = jnp.exp(log_scores - log_scores.max(0))
        return (weights[:, :, None] * log_values.astype(jnp.float32)).sum(0) / weights.sum(0)[:, None]
    with jax.named_scope("pages"):
        scores, page_peaks = _page_scores(q_HdB, keys, table)
        peaks_BH = jnp.maximum(_of_rows(page_peaks, table, nothing=_NOTHING).max(1), log_scores.max(0).T)
        mixed_BD, sums_BH = _mix_pages(scores, values, peaks_BH, table)
    with jax.named_scope("log"):
        weights = jnp.exp(log_scores - peaks_BH.T)
        shares = jax.lax.optimization_barrier(1 / (weights.sum(0) + sums_BH.T))
        # Kept apart from what follows: a compiler that fused them would sum the weights anew for every value.
        weights = jax.lax.optimization_barrier(weights * shares)
        mixed_HdB = (weights[:, :, None] * log_values.astype(jnp.float32)).sum(0)
    return mixed_HdB + mixed_BD.T.reshape(mixed_HdB.shape) * shares[:, None]


def _sum_products(a: jax.Array, b: jax.Array, *, axis: int) -> jax.Array:
    """A times b, in float32, summed along an axis.

    In slices: a CPU's compiler sums longer axes in several passes over a product that it writes out.
    """
    size, parts = a.shape[axis], []
    for first in range(0, size, _SLICE):
        here = (slice(None),) * axis + (slice(first, first + _SLICE),)
        other = b[here] if b.shape[axis] == size else b
        parts.append((a[here].astype(jnp.float32) * other).sum(axis))
    return sum(parts[1:], parts[0])


def _page_scores(
    q_HdB: jax.Array, keys: tuple[jax.Array, ...], table: PageTable
) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each block the scores, float32 [P, H, S], and the greatest of each page [P, H]."""
    q_BHd = q_HdB.transpose(2, 0, 1)
    S = keys[0].shape[-1]

    def of_block(
        q_BHd: jax.Array, block: jax.Array, owner: jax.Array, fill: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        scores = _product("PHd,PHdS->PHS", jnp.take(q_BHd, owner, axis=0, mode="clip"), block)
        scores = jnp.where((jnp.arange(S) < fill[:, None])[:, None], scores, _NOTHING)
        return scores, scores.max(-1)

    def passed(
        q_BHd: jax.Array, block: jax.Array, owner: jax.Array, fill: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del q_BHd, owner, fill
        P, H, _, S = block.shape
        return jnp.full((P, H, S), _NOTHING), jnp.full((P, H), _NOTHING)

    parts = [
        _if_used(number, table, of_block, passed, q_BHd, *operands)
        for number, operands in enumerate(zip(keys, *_split(table, keys), strict=True))
    ]
    return [scores for scores, _ in parts], [peaks for _, peaks in parts]


def _mix_pages(
    scores: list[jax.Array], values: tuple[jax.Array, ...], peaks_BH: jax.Array, table: PageTable
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums [B, D] and sums of weights [B, H] over each row's pages, in the order of its text.

    Args:
        scores: of each block, float32 [P, H, S].
        values: of each block, [P, H, S, d].
        peaks_BH: the greatest score of each row.
        table: whose the pages are.
    """

    def of_block(
        scores: jax.Array, block: jax.Array, owner: jax.Array, peaks_BH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # What a free page weighs is nobody's.
        weights = jnp.exp(scores - jnp.take(peaks_BH, owner, axis=0, mode="clip")[..., None])
        return _mix(weights, block), weights.sum(-1)

    def passed(
        scores: jax.Array, block: jax.Array, owner: jax.Array, peaks_BH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del scores, owner
        P, H, _, d = block.shape
        return jnp.zeros((P, H * d)), jnp.zeros((P, peaks_BH.shape[1]))

    owners = _split(table, values)[0]
    parts = [
        _if_used(number, table, of_block, passed, *operands, peaks_BH)
        for number, operands in enumerate(zip(scores, values, owners, strict=True))
    ]
    mixed, sums = zip(*parts, strict=True)
    return _of_rows(mixed, table, nothing=0.0).sum(1), _of_rows(sums, table, nothing=0.0).sum(1)


def _of_rows(parts: Sequence[jax.Array], table: PageTable, *, nothing: float) -> jax.Array:
    """What the pages of each row have, [B, N, ...] of blocks [P, ...]; `nothing` where there are no more.

    A page of nothing stands behind the others: looking up beyond the end and filling in takes 20 times as long.
    """
    whole = jnp.concatenate([*parts, jnp.full((1, *parts[0].shape[1:]), nothing)])
    return jnp.take(whole, table.pages, axis=0, mode="clip")


def _mix(weights: jax.Array, block: jax.Array) -> jax.Array:
    """Each page's weighted sum, float32 [P, D]."""
    return _product("PHS,PHSd->PHd", weights, block).reshape(len(block), -1)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        subscripts,
        a,
        b.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _split(table: PageTable, blocks: tuple[jax.Array, ...]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Owner and fill of each block's pages."""
    ends = list(accumulate(len(block) for block in blocks))[:-1]
    return jnp.split(table.owner, ends), jnp.split(table.fill, ends)


def _if_used(number: int, table: PageTable, used: Any, passed: Any, *operands: jax.Array) -> Any:
    """What a block gives, or, beyond the last one in use, what passing over it gives; always the first's."""
    if number == 0:
        return used(*operands)
    return jax.lax.cond(number < table.blocks, used, passed, *operands)
