"""Oxidation states of the elements of a cell: as a CIF text states them, or as its formula balances."""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.formula import cell_formula
from crystallm_jax.errors import CIFError

# Steps of pymatgen's guess that are taken at most, about a second's: sums of the charges of all elements, and
# sites of the combinations of one element, each as long as so many sums.
_MOST_STEPS = 2_000_000
_SUMS_A_SITE = 10

_TYPE, _NUMBER = "_atom_type_symbol", "_atom_type_oxidation_number"
_SITE_TYPE, _SITE_LABEL = "_atom_site_type_symbol", "_atom_site_label"
_MULTIPLICITY = "_atom_site_symmetry_multiplicity"

_FLOAT = re.compile(r"[-+]?[0-9]{1,6}(?:\.[0-9]{0,9})?")
# Na+, O2-, Fe2.5+, Na+1
_ION = re.compile(r"([A-Z][a-z]?)([0-9.]{0,6})([-+])([0-9.]{0,6})")
_CHARGED_LABEL = re.compile(r"([A-Z][a-z]?)[0-9.]*[-+]")


class Uncharged(NamedTuple):
    """A text without charges, and what it stated: element to its mean oxidation state over the cell."""

    text: str
    states: Mapping[str, float]


class _Loop(NamedTuple):
    """A loop of a text: the line numbers of its head, of its first row and of what follows; its keys."""

    head: int
    first: int
    end: int
    keys: Sequence[str]


def take_oxidation_states(text: str) -> Uncharged:
    """Read the oxidation states of a CIF text and take them out of it.

    They stand in a loop of `_atom_type_oxidation_number`, or in the type symbols of the sites (`Na+`, `O2-`,
    `Fe+3`). An element's state is the mean over its sites, by their multiplicities. Elements with a site of
    unknown state are left out.
    """
    lines = text.split("\n")
    loops = list(_find_loops(lines))
    numbers: dict[str, float] = {}
    removed: set[int] = set()
    for loop in loops:
        if _TYPE in loop.keys and _NUMBER in loop.keys:
            numbers |= _read_numbers(lines, loop)
            removed.update(range(loop.head, loop.end))
    sites: dict[str, list[tuple[float | None, float]]] = defaultdict(list)
    for loop in loops:
        column = next((key for key in (_SITE_TYPE, _SITE_LABEL) if key in loop.keys), None)
        if column is not None:
            for i in range(loop.first, loop.end):
                lines[i] = _take_site(lines[i], loop.keys, column=column, numbers=numbers, sites=sites)
    states = {}
    for symbol, found in sites.items():
        known = [(charge, weight) for charge, weight in found if charge is not None]
        total = sum(weight for _, weight in known)
        if len(known) == len(found) and total > 0:
            states[symbol] = sum(charge * weight for charge, weight in known) / total
    return Uncharged("\n".join(line for i, line in enumerate(lines) if i not in removed), states)


def complete_oxidation_states(counts: Mapping[str, int], stated: Mapping[str, float]) -> Mapping[str, float]:
    """The states of all elements of a formula: those stated, or all guessed where one is missing.

    Raises:
        CIFError: none can be guessed.
    """
    if all(symbol in stated for symbol in counts):
        return {symbol: stated[symbol] for symbol in counts}
    divisor = math.gcd(*counts.values())
    return _guess(tuple((symbol, count // divisor) for symbol, count in counts.items()))


def printed_state(state: float) -> str:
    """An oxidation state as text: at least one decimal (`-2.0`), at most four (`2.6667`)."""
    return str(round(state, 4) + 0.0)


@lru_cache(maxsize=4096)
def printed_radius(symbol: str, state: float) -> str:
    """The ionic radius in Å of an element in a state, by the table of the installed pymatgen.

    States that are not whole, and those without a radius in the table, have the element's average radius.
    """
    from pymatgen.core import Species  # noqa: PLC0415 - keeps the tokenizer's import instant

    radius = None
    if float(state).is_integer():
        # It warns where it takes the radius of another spin state, or has none.
        with warnings.catch_warnings(action="ignore"):
            radius = Species(symbol, int(state)).ionic_radius
    return ELEMENTS[symbol].printed_ionic_radius if radius is None else f"{float(radius):.4f}"


def _find_loops(lines: Sequence[str]) -> Iterator[_Loop]:
    place = 0
    while place < len(lines):
        head = place
        place += 1
        if lines[head].strip() != "loop_":
            continue
        while place < len(lines) and lines[place].strip().startswith("_"):
            place += 1
        first = place
        while place < len(lines) and _is_row(lines[place].strip()):
            place += 1
        yield _Loop(head, first, place, [line.strip() for line in lines[head + 1 : first]])


def _is_row(line: str) -> bool:
    return bool(line) and line != "loop_" and not line.startswith(("_", "data_", "#", ";"))


def _read_numbers(lines: Sequence[str], loop: _Loop) -> dict[str, float]:
    """Type symbol, which may carry its charge, to oxidation number; rows without a number are left out."""
    numbers = {}
    for line in lines[loop.first : loop.end]:
        row = dict(zip(loop.keys, line.split(), strict=False))
        number = row.get(_NUMBER, "")
        if _FLOAT.fullmatch(number):
            numbers[_unquoted(row[_TYPE])] = float(number)
    # Sites may be bare where the types are not; that is plain for an element of one state.
    by_element: dict[str, set[float]] = defaultdict(set)
    for symbol, value in numbers.items():
        by_element[_element_of(symbol)].add(value)
    return {symbol: min(values) for symbol, values in by_element.items() if len(values) == 1} | numbers


def _take_site(
    line: str,
    keys: Sequence[str],
    *,
    column: str,
    numbers: Mapping[str, float],
    sites: Mapping[str, list[tuple[float | None, float]]],
) -> str:
    """The row of a site without charges; its state and multiplicity go into `sites`, under its element."""
    values = line.split()
    row = dict(zip(keys, values, strict=False))
    if len(values) != len(keys):
        return line
    symbol = _unquoted(row[column])
    # A label's digits may count sites.
    ion = _ION.fullmatch(symbol) if column == _SITE_TYPE else None
    element = ion[1] if ion else _element_of(symbol)
    charge = numbers.get(symbol, _charge(ion) if ion else numbers.get(element))
    multiplicity = row.get(_MULTIPLICITY, "1")
    sites[element].append((charge, float(multiplicity) if _FLOAT.fullmatch(multiplicity) else 1.0))
    if ion:
        row[_SITE_TYPE] = element
    if _SITE_LABEL in row:
        row[_SITE_LABEL] = _CHARGED_LABEL.sub(r"\1", _unquoted(row[_SITE_LABEL]), count=1)
    return line if list(row.values()) == values else "  " + "  ".join(row.values())


def _unquoted(value: str) -> str:
    return value.strip("'\"")


def _element_of(symbol: str) -> str:
    """The element that a symbol or a label begins with."""
    match = re.match(r"[A-Z][a-z]?", symbol)
    return match[0] if match else symbol


def _charge(ion: re.Match[str]) -> float | None:
    digits = ion[2] or ion[4] or "1"
    return float(ion[3] + digits) if _FLOAT.fullmatch(digits) else None


@lru_cache(maxsize=4096)
def _guess(reduced: tuple[tuple[str, int], ...]) -> Mapping[str, float]:
    """The likeliest states that balance a reduced formula, by pymatgen's statistics; 0 for an element alone.

    Raises:
        CIFError: none balance, as for most alloys, or there are too many ways to try.
    """
    from pymatgen.core import Composition  # noqa: PLC0415 - keeps the tokenizer's import instant

    counts = dict(reduced)
    formula = cell_formula(counts)
    mend = "state _atom_type_oxidation_number in the file, or prepare without oxidation states"
    if _steps(counts) > _MOST_STEPS:
        raise CIFError(f"oxidation states of {formula}: too many ways to balance the charges; {mend}")
    guesses = Composition(counts).oxi_state_guesses()
    if not guesses:
        raise CIFError(f"oxidation states of {formula}: none of the usual ones balance; {mend}")
    return {symbol: float(guesses[0][symbol]) for symbol in counts}


def _steps(counts: Mapping[str, int]) -> int:
    """Steps of pymatgen's guess for a reduced formula."""
    sites, sums = 0, 1
    for symbol, count in counts.items():
        states = _usual_states(symbol)
        if states:
            sites += count * math.comb(count + len(states) - 1, count)
            sums *= count * (max(states) - min(states)) + 1
    return _SUMS_A_SITE * sites + sums


@cache
def _usual_states(symbol: str) -> tuple[int, ...]:
    from pymatgen.core import Element  # noqa: PLC0415 - keeps the tokenizer's import instant

    element = Element(symbol)
    return tuple(element.icsd_oxidation_states or element.common_oxidation_states)
