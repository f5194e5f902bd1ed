"""Packing: every record once, no row too long, and rows as full as the lengths allow."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.data.packing import LONGEST_ROW, pack
from crystallm_jax.errors import DataError


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    row_length=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=200)
def test_every_record_is_in_one_row_and_no_row_is_too_long(
    lengths: list[int], row_length: int, seed: int
) -> None:
    given_lengths = np.array(lengths)
    plan = pack(given_lengths, row_length, seed=seed)
    assert sorted(plan.records.tolist()) == list(range(len(lengths)))
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(lengths)
    held = np.minimum(given_lengths, row_length)[plan.records]
    filled = np.add.reduceat(held, plan.offsets[:-1])
    assert np.all(np.diff(plan.offsets) > 0)
    assert filled.max() <= row_length
    assert plan.rows >= -(-int(held.sum()) // row_length)
    # No two rows would fit into one: that would be a row too many.
    emptiest = np.sort(filled)[:2]
    assert len(emptiest) < 2 or emptiest.sum() > row_length
    again = pack(given_lengths, row_length, seed=seed)
    np.testing.assert_array_equal(again.records, plan.records)
    np.testing.assert_array_equal(again.offsets, plan.offsets)


def test_the_longest_takes_those_that_fill_its_row() -> None:
    lengths = np.array([6, 5, 4, 3, 2])
    plan = pack(lengths, 10, seed=0)
    rows = [plan.records[a:b] for a, b in zip(plan.offsets, plan.offsets[1:], strict=False)]
    assert [lengths[row].tolist() for row in rows] == [[6, 4], [5, 3, 2]]


def test_a_length_is_taken_no_more_often_than_there_is() -> None:
    # 7 + 3 + 3 would fill 13, but there is one 3; the best that is there is 7 + 5.
    lengths = np.array([7, 3, 5])
    plan = pack(lengths, 13, seed=0)
    assert lengths[plan.records].tolist() == [7, 5, 3]
    assert plan.offsets.tolist() == [0, 2, 3]


def test_the_seed_draws_which_records_of_a_length_meet() -> None:
    lengths = np.repeat([6, 4], 50)
    one, other = pack(lengths, 10, seed=1), pack(lengths, 10, seed=2)
    assert one.rows == other.rows == 50
    np.testing.assert_array_equal(lengths[one.records], lengths[other.records])
    assert not np.array_equal(one.records, other.records)


def test_lengths_like_those_of_crystals_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).gamma(4, 60, 20_000).astype(int) + 180
    plan = pack(lengths, 2049, seed=0)
    held = np.minimum(lengths, 2049)
    assert held.sum() / (plan.rows * 2049) > 0.98


@pytest.mark.parametrize(
    ("lengths", "row_length", "message"),
    [
        ([], 10, "no record"),
        ([3, 0], 10, "without tokens"),
        ([3], LONGEST_ROW + 1, "block_size must be below 65,536"),
        ([3], 0, "rows of 0 tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths: list[int], row_length: int, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        pack(np.array(lengths, dtype=int), row_length, seed=0)
