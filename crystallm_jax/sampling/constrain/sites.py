"""The registers of the site table, and which space groups a row may still choose."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from crystallm_jax.cif.formula import cell_formula
from crystallm_jax.cif.occupations import (
    common_step,
    compatible_spacegroups,
    least_sites,
    least_sites_table,
    multiplicities,
)
from crystallm_jax.cif.vocabulary import SPACEGROUPS
from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.constrain.costs import ROW_COST, sites_cost
from crystallm_jax.sampling.constrain.nodes import DECIMALS, TOKEN_ID
from crystallm_jax.sampling.constrain.state import MAX_ELEMENTS, MAX_MULTIPLICITIES, MOST_SITES, TABLE_SIZE
from crystallm_jax.sampling.constrain.text_layout import (
    WITH_GROUP,
    Level,
    after_group,
    cell_start,
    cell_values,
    lay_out,
    site_levels,
)

_MAX_TABLE_SITES = 254
_NAMED = 4

Counts = tuple[tuple[str, int], ...]
"""A composition that can be a key."""


class SitePlan(NamedTuple):
    """The registers of the site table, by name, and the fewest tokens of it."""

    registers: Mapping[str, np.ndarray]
    least_tokens: int


@lru_cache(maxsize=1024)
def plan_sites(level: Level, counts: Counts, symbol: str | None, *, limit: int) -> SitePlan:
    """The registers of the sites of a composition, from level `symmetry` on in a space group.

    Raises:
        SamplingError: the space group cannot hold the composition, or its table is too large.
    """
    known = dict(counts)
    levels = site_levels(known)
    if level in WITH_GROUP and symbol is not None:
        levels = _table_levels(counts, symbol)
    ordered = [element for elements in levels for element in elements]
    count = [known[element] for element in ordered]
    registers = {
        "elements": _padded([TOKEN_ID[element] for element in ordered], MAX_ELEMENTS, -1),
        "levels": _padded([n for n, elements in enumerate(levels) for _ in elements], MAX_ELEMENTS, 0),
        "remaining": _padded(count, MAX_ELEMENTS, 0),
        "counts": _padded(count, MAX_ELEMENTS, 0),
    }
    if level == "composition" or symbol is None:
        digits = len(str(max(count)))
        registers["most_digits"] = np.array(digits, np.int32)
        return SitePlan(registers, sites_cost(len(count), digits))
    fewest = least_sites(known, symbol)
    if fewest is None:
        raise _refusal(counts, symbol)
    if level == "positions":
        if fewest > MOST_SITES:
            raise SamplingError(
                f"composition {cell_formula(known)} takes {fewest} sites in {symbol}: level positions looks at "
                f"{MOST_SITES} at most; use level symmetry"
            )
        values = [value and round(value * 10**DECIMALS) for value in cell_values(symbol)]
        registers["cell"] = np.array([value or 0 for value in values], np.int32)
    digits = _most_digits(counts, symbol)
    table = _table(counts, symbol, most_sites=min(_MAX_TABLE_SITES, limit // ROW_COST + 1))
    registers |= table | {"most_digits": np.array(digits, np.int32)}
    return SitePlan(registers, sites_cost(fewest, digits))


@lru_cache(maxsize=1024)
def _table(counts: Counts, symbol: str, *, most_sites: int) -> dict[str, np.ndarray]:
    """The registers of the table of feasible sites.

    Raises:
        SamplingError: it is too large.
    """
    known = dict(counts)
    levels = _table_levels(counts, symbol)
    values, most = multiplicities(symbol)
    step = common_step(symbol)
    if _table_size(counts, symbol) > TABLE_SIZE:
        raise SamplingError(
            f"composition {cell_formula(known)} is too large for level symmetry in {symbol}: use level composition"
        )
    amounts = [[known[element] for element in elements] for elements in levels]
    table = least_sites_table(amounts, symbol, most_sites=most_sites)
    bases = [bound + 1 if bound else 1 for bound in most]
    strides = [
        math.prod(n // step + 1 for n in level[place + 1 :])
        for level in amounts
        for place in range(len(level))
    ]
    size = len(values)
    return {
        "table": _padded(table.ravel().tolist(), TABLE_SIZE, 0, np.uint8),
        "positions": np.array(table.shape[1], np.int32),
        "index": np.array(len(table) - 1, np.int32),
        "strides": _padded(strides, MAX_ELEMENTS, 0),
        "multiplicities": _padded(values, MAX_MULTIPLICITIES, 0),
        "steps": _padded([value // step for value in values], MAX_MULTIPLICITIES, 0),
        "most": _padded(most, MAX_MULTIPLICITIES, 0),
        "weights": _padded([math.prod(bases[i + 1 :]) for i in range(size)], MAX_MULTIPLICITIES, 1),
    }


def groups_within(level: Level, counts: Counts, *, spent: int, limit: int) -> list[str]:
    """The space groups that hold a composition and whose files fit what is left of a limit.

    Raises:
        SamplingError: there are none.
    """
    known = dict(counts)
    needed = {}
    for symbol in compatible_spacegroups(known):
        fewest = least_sites(known, symbol)
        if fewest is not None and _table_size(counts, symbol) <= TABLE_SIZE:
            if level == "positions" and fewest > MOST_SITES:
                continue
            rest = sites_cost(fewest, _most_digits(counts, symbol))
            needed[symbol] = spent + _fixed_tokens(level, counts, symbol) + rest
    fitting = [symbol for symbol, tokens in needed.items() if tokens <= limit]
    if not fitting:
        least = min(needed.values(), default=None)
        raise SamplingError(
            f"composition {cell_formula(known)} is too large for level {level}: use level composition"
            if least is None
            else f"a limit of {limit} tokens is too small for {cell_formula(known)} at level {level}: the shortest "
            f"such file takes {least}, prompt included"
        )
    return fitting


def _fixed_tokens(level: Level, counts: Counts, symbol: str) -> int:
    """The fewest tokens from a space group on, but for the sites."""
    number = SPACEGROUPS[symbol]
    return _tokens_of_cell(level, counts, cell_start(number)) + len(str(number))


@lru_cache(maxsize=1024)
def _tokens_of_cell(level: Level, counts: Counts, first_number: int) -> int:
    """The fewest tokens from a space group on, but for its number and the sites, by the first number of its lattice."""
    symbol = next(symbol for symbol, number in SPACEGROUPS.items() if cell_start(number) == first_number)
    parts = after_group(level, dict(counts), symbol)
    return lay_out(parts).least_tokens(0) - len(str(SPACEGROUPS[symbol]))


def _refusal(counts: Counts, symbol: str) -> SamplingError:
    known = dict(counts)
    compatible = compatible_spacegroups(known)
    named = ", ".join(compatible[-_NAMED:])
    return SamplingError(
        f"space group {symbol} cannot hold {cell_formula(known)}: no choice of its site multiplicities gives these "
        f"counts; {len(compatible)} space groups can, among them {named}"
    )


def _table_levels(counts: Counts, symbol: str) -> list[list[str]]:
    """The levels of the sites' order; where their table would be too large, every element is one."""
    levels = site_levels(dict(counts))
    if _size(counts, symbol, levels) <= TABLE_SIZE:
        return levels
    return [[element] for level in levels for element in level]


def _table_size(counts: Counts, symbol: str) -> int:
    return _size(counts, symbol, _table_levels(counts, symbol))


def _size(counts: Counts, symbol: str, levels: Sequence[Sequence[str]]) -> int:
    known, step = dict(counts), common_step(symbol)
    states = sum(math.prod(known[element] // step + 1 for element in level) for level in levels)
    return states * math.prod(bound + 1 for bound in multiplicities(symbol).most)


def _most_digits(counts: Counts, symbol: str) -> int:
    """Digits of the greatest multiplicity that the composition can have."""
    greatest = max(count for _, count in counts)
    return len(str(max(value for value in multiplicities(symbol).values if value <= greatest)))


def _padded(values: Sequence[int], size: int, rest: int, dtype: type = np.int32) -> np.ndarray:
    padded: np.ndarray = np.full(size, rest, dtype)
    padded[: len(values)] = values
    return padded
