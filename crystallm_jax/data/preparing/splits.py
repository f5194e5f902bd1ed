"""Dividing records into train, validation and test."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np

from crystallm_jax.errors import ConfigError, DataError

SplitBy: TypeAlias = Literal["random", "formula", "spacegroup"]
PUBLISHED_SPLIT = (0.10, 0.0045)
PUBLISHED_SEED = 20230610


@dataclasses.dataclass(frozen=True)
class Split:
    """How records are divided.

    Attributes:
        val: share (below 1) or number of records for validation; a share is of what test leaves, as published.
        test: share or number of records for test, taken first.
        by: `random`, as published; `formula`, where all records of a reduced formula stand in one set, so that no
            polymorph of a held-out crystal is trained on; `spacegroup`, where each set has every space group in
            the same share.
    """

    val: float = PUBLISHED_SPLIT[0]
    test: float = PUBLISHED_SPLIT[1]
    by: SplitBy = "random"

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            size = getattr(self, name)
            if not (0 < size < 1 or (size >= 1 and float(size).is_integer())):
                raise ConfigError(
                    f"split {self.val:g},{self.test:g}: give two shares below 1 or two numbers of records, such as "
                    "0.1,0.0045"
                )


def split_rows(
    rows: np.ndarray, split: Split, *, seed: int, groups: np.ndarray | None = None
) -> Mapping[str, np.ndarray]:
    """Divide rows [N] into train, val and test, each in the order of `rows`.

    Args:
        rows: numbers of records.
        split: sizes and manner.
        seed: of NumPy's legacy generator, which the published script uses through scikit-learn: with `random` the
            sets are those of the published script for the same records in the same order.
        groups: int [N], equal for rows of the same reduced formula or space group; unused with `random`.

    Raises:
        DataError: too few rows, or too few groups, for one in each set.
    """
    hold_out = {"random": _random, "formula": _whole_groups, "spacegroup": _stratified}[split.by]
    groups = np.zeros(len(rows), np.int64) if groups is None else groups
    everything = np.arange(len(rows))
    test = hold_out(groups, _size(split.test, len(rows)), seed)
    rest = np.setdiff1d(everything, test)
    # As published, the second draw permutes the records in the order in which the first left them.
    rest = _shuffled_rest(len(rows), len(test), seed) if split.by == "random" else rest
    val = rest[hold_out(groups[rest], _size(split.val, len(rest)), seed)]
    train = np.setdiff1d(rest, val)
    parts = {"train": train, "val": np.sort(val), "test": np.sort(test)}
    if any(not len(part) for part in parts.values()):
        sizes = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
        raise DataError(
            f"{len(rows):,} records cannot be split by {split.val:g},{split.test:g} ({sizes}): give more or leave out "
            "--split"
        )
    return {name: rows[part] for name, part in parts.items()}


def _size(size: float, n: int) -> int:
    return min(n, math.ceil(size * n) if size < 1 else int(size))


def _shuffled_rest(n: int, n_out: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).permutation(n)[n_out:]


def _random(groups: np.ndarray, n_out: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).permutation(len(groups))[:n_out]


def _whole_groups(groups: np.ndarray, n_out: int, seed: int) -> np.ndarray:
    """Places of whole groups, drawn until `n_out` are held out; a group that would exceed that is passed over."""
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    taken = np.zeros(len(names), bool)
    total = 0
    for group in np.random.RandomState(seed).permutation(len(names)):
        if total + sizes[group] <= n_out:
            taken[group] = True
            total += sizes[group]
        if total == n_out:
            break
    return np.flatnonzero(taken[member])


def _stratified(groups: np.ndarray, n_out: int, seed: int) -> np.ndarray:
    """Places such that each group gives its share of `n_out`, by largest remainders."""
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    exact = sizes * (n_out / max(len(groups), 1))
    share = np.floor(exact).astype(np.int64)
    order = np.random.RandomState(seed).permutation(len(groups))
    ties = np.random.RandomState(seed).permutation(len(names))
    by_remainder = ties[np.argsort(-(exact - share)[ties], kind="stable")]
    share[by_remainder[: n_out - share.sum()]] += 1
    shuffled = member[order]
    by_group = np.argsort(shuffled, kind="stable")
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.arange(len(groups)) - firsts[shuffled[by_group]]
    return order[by_group[rank < share[shuffled[by_group]]]]
