"""How atoms can be spread over the sites of a space group: whether a composition fits, and with how few sites."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from crystallm_jax.cif.vocabulary import SPACEGROUPS
from crystallm_jax.cif.wyckoff import site_classes
from crystallm_jax.errors import CIFError

IMPOSSIBLE = 255
"""Stands in tables of least numbers of sites where no number is enough."""


class Multiplicities(NamedTuple):
    """The site multiplicities of a space group, rising.

    Attributes:
        values: the multiplicities, none twice.
        most: how many sites can have each in one crystal; 0 means any number.
    """

    values: tuple[int, ...]
    most: tuple[int, ...]


@lru_cache(maxsize=256)
def multiplicities(symbol: str) -> Multiplicities:
    """Those of a space group in the vocabulary's notation; a position with free parameters sets no bound.

    Raises:
        CIFError: no such symbol.
    """
    most: dict[int, int] = {}
    for multiplicity, positions in site_classes(symbol):
        bounded = positions is not None and most.get(multiplicity, 1) > 0
        most[multiplicity] = most.get(multiplicity, 0) + (positions or 0) if bounded else 0
    values = tuple(sorted(most))
    return Multiplicities(values, tuple(most[value] for value in values))


def fits(counts: Mapping[str, int], symbol: str) -> bool:
    """Whether a cell of these counts can have the space group, as far as site multiplicities tell.

    Args:
        counts: atoms of each element in the conventional cell.
        symbol: as in the vocabulary.

    Raises:
        CIFError: no such space group.
    """
    return least_sites(counts, symbol) is not None


def compatible_spacegroups(counts: Mapping[str, int]) -> tuple[str, ...]:
    """The symbols of the vocabulary's space groups that a cell of these counts can have, by number."""
    return _compatible(tuple(sorted(counts.values())))


def least_sites(counts: Mapping[str, int], symbol: str) -> int | None:
    """The fewest sites that hold a cell's atoms in a space group, each element on sites of its own.

    None where no choice of sites does.

    Raises:
        CIFError: no such space group.
    """
    return _least_sites(tuple(sorted(counts.values())), symbol)


def least_sites_table(
    levels: Sequence[Sequence[int]], symbol: str, *, most_sites: int = IMPOSSIBLE - 1
) -> np.ndarray:
    """For all that can be left of a crystal that is filled level by level, the fewest sites that finish it.

    A level is a set of elements that stand among each other, in any order; a later level begins when an earlier
    one is done. A state is what is left of the current level's elements and which bounded positions are taken.

    Args:
        levels: atoms of each element, level by level, each a multiple of `common_step(symbol)`.
        symbol: of the space group.
        most_sites: more than so many are IMPOSSIBLE.

    Returns:
        uint8 [S, P]. S: the last level's states, then those of the level before it, up to the first; in each level
        the atoms left of its elements in steps of `common_step`, the last element's changing fastest. So a level
        is full in its last state, and empty in its first, which has the full one of the next level before it. P:
        the taken positions as a number in the mixed base of `most + 1` over the bounded multiplicities, the last
        one's changing fastest.
    """
    values, most = multiplicities(symbol)
    step = common_step(symbol)
    bounded = [i for i, bound in enumerate(most) if bound]
    taken_shape = tuple(most[i] + 1 for i in bounded)
    after = np.zeros(taken_shape, np.int16)
    tables: list[np.ndarray] = []
    for level in reversed(levels):
        table = np.full((*(n // step + 1 for n in level), *taken_shape), IMPOSSIBLE, np.int16)
        table[(0,) * len(level)] = after
        moves = [
            _move(element, len(level), value // step, bounded=bounded.index(i) if most[i] else None)
            for element in range(len(level))
            for i, value in enumerate(values)
            if value <= level[element]
        ]
        for _ in range(most_sites):
            before = table.copy()
            for to, origin in moves:
                np.minimum(table[to], before[origin] + 1, out=table[to])
            if np.array_equal(before, table):
                break
        table[table > most_sites] = IMPOSSIBLE
        after = table[tuple(n // step for n in level)]
        tables.append(table.astype(np.uint8).reshape(-1, after.size))
    return np.concatenate(tables)


def common_step(symbol: str) -> int:
    """The greatest number that divides all site multiplicities of a space group."""
    return math.gcd(*multiplicities(symbol).values)


def _move(
    element: int, elements: int, steps: int, *, bounded: int | None
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The slices of states that a site leads from, and of those that it leads to."""
    to, origin = [slice(None)] * elements, [slice(None)] * elements
    to[element], origin[element] = slice(steps, None), slice(None, -steps)
    if bounded is None:
        return tuple(to), tuple(origin)
    # From a state with a free position to one with it taken.
    whole = [slice(None)] * bounded
    return (*to, *whole, slice(None, -1)), (*origin, *whole, slice(1, None))


@lru_cache(maxsize=4096)
def _compatible(counts: tuple[int, ...]) -> tuple[str, ...]:
    by_number = sorted(SPACEGROUPS, key=SPACEGROUPS.__getitem__)
    return tuple(symbol for symbol in by_number if _least_sites(counts, symbol) is not None)


@lru_cache(maxsize=1 << 16)
def _least_sites(counts: tuple[int, ...], symbol: str) -> int | None:
    if not counts or min(counts) < 1:
        raise CIFError(f"counts {counts}: a composition has at least one element, each at least once")
    values, most = multiplicities(symbol)
    free = tuple(value for value, bound in zip(values, most, strict=True) if not bound)
    bounded = [(value, bound) for value, bound in zip(values, most, strict=True) if bound]
    capacity = tuple(bound for _, bound in bounded)
    # From the positions that are left to the fewest sites that leave them.
    best: dict[tuple[int, ...], int] = {capacity: 0}
    for count in counts:
        fewest = _fewest_free(free, count)
        found: dict[tuple[int, ...], int] = {}
        choices = [
            (taken, sum(taken) + int(fewest[rest]))
            for taken, rest in _taken(tuple(bounded), count)
            if fewest[rest] >= 0
        ]
        for left, sites in best.items():
            for taken, more in choices:
                rest_left = tuple(a - b for a, b in zip(left, taken, strict=True))
                if min(rest_left, default=0) >= 0:
                    found[rest_left] = min(found.get(rest_left, sites + more), sites + more)
        best = found
    return min(best.values(), default=None)


@lru_cache(maxsize=4096)
def _taken(bounded: tuple[tuple[int, int], ...], count: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """How many of each bounded position one element can take, and how many of its atoms that leaves."""
    choices: list[tuple[tuple[int, ...], int]] = [((), count)]
    for value, bound in bounded:
        choices = [
            ((*taken, n), rest - n * value)
            for taken, rest in choices
            for n in range(min(bound, rest // value) + 1)
        ]
    return tuple(choices)


@lru_cache(maxsize=4096)
def _fewest_free(free: tuple[int, ...], count: int) -> np.ndarray:
    """The fewest sites of the unbounded multiplicities that hold 0, 1, … `count` atoms [count + 1]; -1 for none."""
    fewest = [0] + [-1] * count
    for n in range(1, count + 1):
        options = [fewest[n - value] for value in free if value <= n and fewest[n - value] >= 0]
        fewest[n] = 1 + min(options) if options else -1
    return np.array(fewest)
