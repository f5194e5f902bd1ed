"""Splits: that of the published script, whole formulas, and space groups in equal shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.data.preparing.splits import PUBLISHED_SEED, Split, split_rows
from crystallm_jax.errors import ConfigError, DataError


def test_the_split_is_that_of_the_published_script() -> None:
    # From scikit-learn 1.9.1: train_test_split of range(40), test_size 0.1 then 0.2, random_state 20230610.
    parts = split_rows(np.arange(40), Split(0.2, 0.1), seed=PUBLISHED_SEED)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 28, "val": 8, "test": 4}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(40))
    assert parts["test"].tolist() == [5, 29, 31, 39]
    assert parts["val"].tolist() == [0, 2, 6, 11, 13, 14, 15, 28]
    assert all(np.all(np.diff(rows) > 0) for rows in parts.values())
    other = split_rows(np.arange(40), Split(0.2, 0.1), seed=1)
    assert other["test"].tolist() != parts["test"].tolist()


def test_every_set_has_a_record() -> None:
    parts = split_rows(np.arange(3), Split(0.1, 0.0045), seed=0)
    assert [len(rows) for rows in parts.values()] == [1, 1, 1]
    with pytest.raises(DataError, match="2 records cannot be split"):
        split_rows(np.arange(2), Split(0.1, 0.0045), seed=0)


def test_sizes_may_be_numbers_of_records() -> None:
    parts = split_rows(np.arange(100), Split(20, 7), seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 73, "val": 20, "test": 7}


@pytest.mark.parametrize("sizes", [(0, 0.1), (0.1, -1), (1.5, 0.1), (0.1, float("nan"))])
def test_sizes_that_are_neither_shares_nor_numbers(sizes: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="two shares below 1 or two numbers"):
        Split(*sizes)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=40, max_size=300),
    seed=st.integers(0, 2**32 - 1),
    by=st.sampled_from(["random", "formula", "spacegroup"]),
)
def test_each_record_goes_to_one_set_and_the_order_stays(groups: list[int], seed: int, by: str) -> None:
    rows, kinds = np.arange(len(groups)) * 3 + 5, np.array(groups)
    try:
        parts = split_rows(rows, Split(0.2, 0.2, by), seed=seed, groups=kinds)
    except DataError:  # groups so large that none fits
        assert by == "formula"
        return
    assert sorted(np.concatenate(list(parts.values())).tolist()) == rows.tolist()
    assert all(np.all(np.diff(part) > 0) for part in parts.values())
    kind_of = dict(zip(rows.tolist(), groups, strict=True))
    kinds_of = {name: {kind_of[row] for row in part.tolist()} for name, part in parts.items()}
    if by == "formula":
        assert not kinds_of["train"] & kinds_of["test"]
        assert not kinds_of["train"] & kinds_of["val"]
        assert not kinds_of["val"] & kinds_of["test"]
    if by == "spacegroup":
        for kind in set(groups):
            share = groups.count(kind) * 0.2
            in_test = sum(kind_of[row] == kind for row in parts["test"].tolist())
            assert abs(in_test - share) < 1.5
