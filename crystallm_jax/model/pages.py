"""The key-value cache: pages of a pool, of which a step reads those in use and no others.

    P pages of a block    S positions of a page    G blocks    B rows    N pages of the longest row

A page holds keys and values of up to S tokens of one row. What a step reads is therefore what the rows' lengths add up
to, not their number times the longest. Keys and values of the tokens of the last few steps stand in a log that all rows
write at the same place; it becomes a page of each row when it is full. Keys lie with their positions innermost: scores
are then sums over an outer axis, which vectorises everywhere.

The pool is a tuple of blocks, so that it can grow without a copy and a CPU can pass over blocks that nobody uses.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystallm_jax.model.config import ModelConfig

# A score that weighs nothing; finite, so that pages without any token stay free of NaN.
_NOTHING = -1e30


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
        owner: int32 [G P]; the row of each page, B where it is free.
        fill: int32 [G P]; how many of its positions are taken, from the first on.
        pages: int32 [B, N]; each row's pages in the order of its text, G P where there are no more.
        blocks: int32 []; blocks beyond the last one in use may be passed over.
    """

    owner: jax.Array
    fill: jax.Array
    pages: jax.Array
    blocks: jax.Array


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
        log_scores = jnp.where(seen, (log_keys.astype(jnp.float32) * q_HdB).sum(2), _NOTHING)
    if not keys:
        weights = jnp.exp(log_scores - log_scores.max(0))
        return (weights[:, :, None] * log_values.astype(jnp.float32)).sum(0) / weights.sum(0)[:, None]
    with jax.named_scope("pages"):
        scores = _page_scores(q_HdB, keys, table)
        page_peaks = jnp.concatenate([block.max(-1) for block in scores])
        peaks_BH = jnp.maximum(
            jnp.take(page_peaks, table.pages, axis=0, mode="fill", fill_value=_NOTHING).max(1),
            log_scores.max(0).T,
        )
        mixed_DB, sums_HB = _mix_pages(scores, values, peaks_BH, table)
    weights = jnp.exp(log_scores - peaks_BH.T)
    mixed = (weights[:, :, None] * log_values.astype(jnp.float32)).sum(0)
    return (mixed + mixed_DB.reshape(mixed.shape)) / (weights.sum(0) + sums_HB)[:, None]


def _page_scores(q_HdB: jax.Array, keys: tuple[jax.Array, ...], table: PageTable) -> list[jax.Array]:
    """For each block float32 [P, H, S]."""
    q_BHd = q_HdB.transpose(2, 0, 1)
    S = keys[0].shape[-1]

    def of_block(q_PHd: jax.Array, block: jax.Array, fill: jax.Array) -> jax.Array:
        scores = (q_PHd[..., None] * block.astype(jnp.float32)).sum(2)
        return jnp.where((jnp.arange(S) < fill[:, None])[:, None], scores, _NOTHING)

    def passed(q_PHd: jax.Array, block: jax.Array, fill: jax.Array) -> jax.Array:
        del block, fill
        return jnp.full((*q_PHd.shape[:2], S), _NOTHING)

    result = []
    for number, (block, owner, fill) in enumerate(zip(keys, *_split(table, len(keys)), strict=True)):
        q_PHd = jnp.take(q_BHd, owner, axis=0, mode="clip")
        result.append(_if_used(number, table, of_block, passed, q_PHd, block, fill))
    return result


def _mix_pages(
    scores: list[jax.Array], values: tuple[jax.Array, ...], peaks_BH: jax.Array, table: PageTable
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of values [D, B] and of the weights [H, B] over each row's pages."""
    B, H = peaks_BH.shape

    def of_block(scores: jax.Array, peaks: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp(scores - peaks[..., None])
        mixed = (weights[..., None] * block.astype(jnp.float32)).sum(2)
        return mixed.reshape(len(block), -1), weights.sum(-1)

    def passed(scores: jax.Array, peaks: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        del peaks
        return jnp.zeros((len(block), H * block.shape[-1])), jnp.zeros(scores.shape[:2])

    parts = []
    for number, (block_scores, block, owner) in enumerate(
        zip(scores, values, _split(table, len(values))[0], strict=True)
    ):
        # A free page's scores weigh nothing against whatever peak.
        peaks = jnp.take(peaks_BH, owner, axis=0, mode="fill", fill_value=0.0)
        parts.append(_if_used(number, table, of_block, passed, block_scores, peaks, block))
    mixed_PD, sums_PH = (jnp.concatenate(part) for part in zip(*parts, strict=True))

    def by_product(mixed_PD: jax.Array, sums_PH: jax.Array) -> tuple[jax.Array, jax.Array]:
        whose = (table.owner == jnp.arange(B)[:, None]).astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        return jnp.matmul(whose, mixed_PD, precision=exact), jnp.matmul(whose, sums_PH, precision=exact)

    def by_lookup(mixed_PD: jax.Array, sums_PH: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_row(x: jax.Array) -> jax.Array:
            return jnp.take(x, table.pages, axis=0, mode="fill", fill_value=0.0).sum(1)

        return of_row(mixed_PD), of_row(sums_PH)

    # A CPU multiplies faster than it looks up; elsewhere the product would cost as much as the whole step.
    mixed_BD, sums_BH = jax.lax.platform_dependent(mixed_PD, sums_PH, cpu=by_product, default=by_lookup)
    return mixed_BD.T, sums_BH.T


def _split(table: PageTable, blocks: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Owner and fill of each block's pages."""
    return jnp.split(table.owner, blocks), jnp.split(table.fill, blocks)


def _if_used(number: int, table: PageTable, used: Any, passed: Any, *operands: jax.Array) -> Any:
    """What a block gives, or, beyond the last one in use, what passing over it gives; always the first where there is one."""
    if operands and number == 0:
        return used(*operands)
    return jax.lax.cond(number < table.blocks, used, passed, *operands)
