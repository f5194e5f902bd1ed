"""Attention over pages: that of each row to its own text, wherever its pages lie."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.model import ModelConfig
from crystallm_jax.model.pages import (
    Log,
    Pages,
    PageTable,
    attend_pages,
    column_pages,
    empty_log,
    empty_pages,
    log_pages,
    put_pages,
)

H, D_HEAD, S = 2, 4, 4
BLOCK, BLOCKS = 6, 3
# Positions taken in the pages of each row, in the order of its text: pages that were begun before the last was full,
# a row without any, and one of a single position.
FILLS = [[4, 4, 2, 4, 1], [], [1], [3, 4]]
NEWEST, STEPS = 2, 5
GARBAGE = 1e4

_attend = jax.jit(attend_pages)


class Case(NamedTuple):
    """What `attend_pages` is given, and each row's keys and values [T, H, d] in the order of its text."""

    queries: np.ndarray
    pages: list[Pages]
    log: Log
    table: PageTable
    texts: list[tuple[np.ndarray, np.ndarray]]


def _case(seed: int, *, blocks_used: int = BLOCKS) -> Case:
    """Random pages in random places of the first blocks; whatever is not taken is full of garbage."""
    rng = np.random.default_rng(seed)
    B, P = len(FILLS), BLOCK * BLOCKS
    keys = np.full((P, H, D_HEAD, S), GARBAGE, np.float32)
    values = np.full((P, H, S, D_HEAD), -GARBAGE, np.float32)
    log_keys, log_values = np.full((2, STEPS, H, D_HEAD, B), GARBAGE, np.float32)
    places = rng.permutation(BLOCK * blocks_used).tolist()
    owner, fill = np.full(P, B, np.int32), np.zeros(P, np.int32)
    book = np.full((B, 7), P, np.int32)
    texts = []
    for row, fills in enumerate(FILLS):
        k, v = rng.normal(size=(2, sum(fills) + NEWEST + 1, H, D_HEAD)).astype(np.float32)
        first = 0
        for number, count in enumerate(fills):
            page = places.pop()
            owner[page], fill[page], book[row, number] = row, count, page
            keys[page, :, :, :count] = k[first : first + count].transpose(1, 2, 0)
            values[page, :, :count] = v[first : first + count].transpose(1, 0, 2)
            first += count
        log_keys[: NEWEST + 1, :, :, row] = k[first:]
        log_values[: NEWEST + 1, :, :, row] = v[first:]
        texts.append((k, v))
    parts = [slice(number * BLOCK, (number + 1) * BLOCK) for number in range(BLOCKS)]
    pages = [Pages((jnp.asarray(keys[part]),), (jnp.asarray(values[part]),)) for part in parts]
    log = Log((jnp.asarray(log_keys),), (jnp.asarray(log_values),))
    table = PageTable(owner, fill, book, np.int32(blocks_used))
    return Case(rng.normal(size=(H, D_HEAD, B)).astype(np.float32), pages, log, table, texts)


def _found(case: Case) -> np.ndarray:
    keys = tuple(block.keys[0] for block in case.pages)
    values = tuple(block.values[0] for block in case.pages)
    given = {"table": case.table, "newest": jnp.int32(NEWEST)}
    return np.asarray(_attend(case.queries, keys, values, case.log.keys[0], case.log.values[0], **given))


def _expected(case: Case) -> np.ndarray:
    """Plain softmax attention of each row to its text, float64 [H, d, B]."""
    rows = []
    for row, (k, v) in enumerate(case.texts):
        scores = np.einsum("Hd,THd->HT", case.queries[:, :, row].astype(np.float64), k) / np.sqrt(D_HEAD)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        rows.append(np.einsum("HT,THd->Hd", weights / weights.sum(-1, keepdims=True), v))
    return np.stack(rows, axis=-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pages_anywhere_give_plain_attention(seed: int) -> None:
    case = _case(seed)
    found = _found(case)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _expected(case), rtol=0, atol=2e-6)


def test_blocks_beyond_the_last_in_use_are_not_read() -> None:
    case = _case(3, blocks_used=2)
    unread = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), case.pages[2])
    np.testing.assert_allclose(
        _found(case._replace(pages=[*case.pages[:2], unread])), _expected(case), rtol=0, atol=2e-6
    )


def test_without_any_page_the_log_is_all() -> None:
    case = _case(4)
    table = PageTable(
        np.full_like(case.table.owner, len(FILLS)),
        np.zeros_like(case.table.fill),
        np.full_like(case.table.pages, BLOCK * BLOCKS),
        np.int32(0),
    )
    texts = [(k[-NEWEST - 1 :], v[-NEWEST - 1 :]) for k, v in case.texts]
    alone = case._replace(table=table, texts=texts)
    np.testing.assert_allclose(_found(alone), _expected(alone), rtol=0, atol=2e-6)
    np.testing.assert_allclose(_found(alone._replace(pages=[])), _expected(alone), rtol=0, atol=2e-6)


def test_a_row_does_not_depend_on_the_pages_of_others() -> None:
    case = _case(5)
    before = _found(case)
    others = np.isin(case.table.owner, [0, 1, 3])

    def other(leaf: jax.Array, number: int) -> jax.Array:
        mine = others[number * BLOCK : (number + 1) * BLOCK]
        return jnp.where(mine.reshape(-1, 1, 1, 1), leaf * -3 + 1, leaf)

    changed = [jax.tree.map(partial(other, number=number), block) for number, block in enumerate(case.pages)]
    after = _found(case._replace(pages=changed))
    np.testing.assert_array_equal(after[..., 2], before[..., 2])
    assert np.abs(after[..., [0, 3]] - before[..., [0, 3]]).max() > 0.1


def test_great_scores_neither_overflow_nor_vanish() -> None:
    case = _case(6)
    for factor in (1e3, -1e3):
        great = case._replace(queries=case.queries * np.float32(factor))
        np.testing.assert_allclose(_found(great), _expected(great), rtol=0, atol=1e-3)


def test_pages_of_bfloat16_are_summed_in_float32() -> None:
    case = _case(7)

    def rounded(tree: object) -> object:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)

    pages, log, texts = rounded(case.pages), rounded(case.log), rounded(case.texts)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), texts)
    found = _found(case._replace(pages=pages, log=log))
    assert found.dtype == np.float32
    # What is kept is rounded; nothing else is.
    np.testing.assert_allclose(found, _expected(case._replace(texts=exact)), rtol=0, atol=2e-6)
    assert np.abs(found - _expected(case)).max() > 1e-4


def test_the_log_becomes_a_page_of_each_row() -> None:
    case = _case(8)
    pages = log_pages(case.log)
    for row, (k, v) in enumerate(case.texts):
        first = len(k) - NEWEST - 1
        np.testing.assert_array_equal(pages.keys[0][row, :, :, : NEWEST + 1], k[first:].transpose(1, 2, 0))
        np.testing.assert_array_equal(pages.values[0][row, :, : NEWEST + 1], v[first:].transpose(1, 0, 2))


def test_columns_become_pages() -> None:
    rng = np.random.default_rng(9)
    k, v = rng.normal(size=(2, H, D_HEAD, 11)).astype(np.float32)
    columns = np.array([[3, 4, 5, 6], [10, 0, 0, 0]])
    keys, values = column_pages(k, v, columns)
    assert (keys.shape, values.shape) == ((2, H, D_HEAD, S), (2, H, S, D_HEAD))
    np.testing.assert_array_equal(keys[0], k[:, :, 3:7])
    np.testing.assert_array_equal(values[0], v[:, :, 3:7].swapaxes(1, 2))
    np.testing.assert_array_equal(keys[1, :, :, 0], k[:, :, 10])


def test_pages_are_put_where_they_belong_and_nowhere_else() -> None:
    config = ModelConfig(n_layer=2, n_head=H, n_embd=H * D_HEAD, block_size=16, vocab_size=12)
    block = empty_pages(config, BLOCK, S, "bfloat16")
    assert [leaf.shape[0] for leaf in jax.tree.leaves(block)] == [BLOCK] * 4
    some = jax.tree.map(
        lambda leaf: jnp.arange(1.0, 4.0).reshape(3, 1, 1, 1) * jnp.ones(leaf.shape[1:]), block
    )
    source, target = np.array([2, 0, 1, 0], np.int32), np.array([1, 4, BLOCK, BLOCK], np.int32)
    for leaf in jax.tree.leaves(put_pages(block, some, source, target)):
        assert leaf.dtype == jnp.bfloat16
        assert np.asarray(leaf[:, 0, 0, 0], np.float32).tolist() == [0, 3, 0, 0, 1, 0]


def test_a_log_has_room_for_each_row_and_step() -> None:
    config = ModelConfig(n_layer=2, n_head=H, n_embd=H * D_HEAD, block_size=16, vocab_size=12)
    leaves = jax.tree.leaves(empty_log(config, 3, STEPS, "float32"))
    assert [leaf.shape for leaf in leaves] == [(STEPS, H, D_HEAD, 3)] * 4
