"""Formulas of a chemical system whose charges can balance."""

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import combinations, pairwise

from crystallm_jax.cif.formula import cell_formula, check_element, formula_order
from crystallm_jax.errors import SamplingError

# Ways to share out the atoms that are tried at most, some seconds' worth.
_MOST_WAYS = 1_000_000


def balanced_formulas(
    elements: Sequence[str], most_atoms: int, *, fewest_elements: int | None = None
) -> list[dict[str, int]]:
    """The reduced formulas of elements whose charges can add up to zero, those of the fewest atoms first.

    An element has one of its common oxidation states, or two that follow each other where both are positive, as in
    Fe3O4; the elements with negative ones are more electronegative than all others. Elements alone are no formula.
    Rarer states, such as that of copper in Cu2O, are left out.

    Args:
        elements: of the system.
        most_atoms: of a formula unit.
        fewest_elements: of a formula; None wants all of them.

    Raises:
        CIFError: an element that the vocabulary lacks.
        SamplingError: no formula, an element twice, or too many ways to share out the atoms.
    """
    system = "-".join(elements)
    for symbol in elements:
        check_element(symbol)
    if len(set(elements)) < len(elements):
        raise SamplingError(f"elements {system}: one of them stands there twice")
    if math.comb(most_atoms + len(elements), len(elements)) > _MOST_WAYS:
        raise SamplingError(
            f"elements {system}: too many formulas of up to {most_atoms} atoms to try: name fewer elements or atoms"
        )
    fewest = max(2, len(elements) if fewest_elements is None else fewest_elements)
    ordered = formula_order(elements)
    formulas = [
        dict(zip(part, counts, strict=True))
        for size in range(fewest, len(elements) + 1)
        for part in combinations(ordered, size)
        for counts in _shares(size, most_atoms)
        if math.gcd(*counts) == 1 and _can_balance(part, counts)
    ]
    if not formulas:
        raise SamplingError(f"elements {system}: {_why_none(elements, most_atoms)}")
    return sorted(formulas, key=lambda counts: (sum(counts.values()), cell_formula(counts)))


@cache
def common_states(symbol: str) -> tuple[int, ...]:
    """The common oxidation states of an element, by the table of the installed pymatgen."""
    from pymatgen.core import Element  # noqa: PLC0415 - slow to import

    return tuple(Element(symbol).common_oxidation_states)


def _why_none(elements: Sequence[str], most_atoms: int) -> str:
    mend = "; ask with --formula, or with a CSV of formulas (--prompts)"
    if len(elements) == 1:
        return f"an element alone has no charges to balance{mend}"
    stateless = [symbol for symbol in elements if not common_states(symbol)]
    if stateless:
        return f"{stateless[0]} has no common oxidation state{mend}"
    if not any(state < 0 for symbol in elements for state in common_states(symbol)):
        return f"no charges balance, as no element has a negative oxidation state (intermetallics){mend}"
    return (
        f"no charges balance in a formula of up to {most_atoms} atoms: allow more (--max-formula-atoms){mend}"
    )


def _shares(parts: int, most: int) -> Iterator[tuple[int, ...]]:
    """All ways to give each of so many parts at least one of at most so many atoms."""
    if parts == 0:
        yield ()
        return
    for first in range(1, most - parts + 2):
        for others in _shares(parts - 1, most - first):
            yield (first, *others)


def _can_balance(symbols: Sequence[str], counts: Sequence[int]) -> bool:
    """Whether the charges can add up to zero; the symbols are ordered by electronegativity."""
    for cations in range(1, len(symbols)):
        sums = {0}
        for place, (symbol, count) in enumerate(zip(symbols, counts, strict=True)):
            charges = _charges(symbol, count, 1 if place < cations else -1)
            sums = {total + charge for total in sums for charge in charges}
        if 0 in sums:
            return True
    return False


@lru_cache(maxsize=1 << 14)
def _charges(symbol: str, count: int, sign: int) -> frozenset[int]:
    """What so many atoms of an element can carry in all, in states of one sign."""
    states = sorted(state for state in common_states(symbol) if state * sign > 0)
    totals = {state * count for state in states}
    if sign > 0:
        for lower, higher in pairwise(states):
            totals.update(lower * (count - n) + higher * n for n in range(1, count))
    return frozenset(totals)
