"""Chemical formulas: what a composition counts, and how the corpus writes it."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from reprlib import repr as shorten

from crystallm_jax.cif.elements import ELEMENTS, ELEMENTS_WITHOUT_TOKEN
from crystallm_jax.errors import CIFError

# Reduced formulas that stay doubled, as in pymatgen 2023.3.23.
_DOUBLED = {
    "LiO": "Li2O2",
    "NaO": "Na2O2",
    "KO": "K2O2",
    "HO": "H2O2",
    "CsO": "Cs2O2",
    "RbO": "Rb2O2",
    "O": "O2",
    "N": "N2",
    "F": "F2",
    "Cl": "Cl2",
    "H": "H2",
}

# A difference of electronegativities from which the last two elements are no polyanion.
_POLYANION_DIFFERENCE = 1.65

_MAX_DIGITS = 9
_PART = re.compile(r"([A-Z][a-z]?)([0-9]*\.?[0-9]*)")


def check_element(symbol: str) -> None:
    """Refuse what is no element with a token.

    Raises:
        CIFError: an element that the vocabulary lacks, deuterium or tritium, or no element at all.
    """
    if symbol in ELEMENTS:
        return
    if symbol in {"D", "T"}:
        raise CIFError(f"element {symbol} is an isotope of hydrogen and has no token: write H")
    if symbol in ELEMENTS_WITHOUT_TOKEN:
        raise CIFError(
            f"element {symbol} has no token: the vocabulary holds {len(ELEMENTS)} elements, not this one"
        )
    near = difflib.get_close_matches(symbol, ELEMENTS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "write a symbol such as Na"
    raise CIFError(f"{symbol!r} is not an element: {hint}")


def parse_formula(formula: str) -> dict[str, int]:
    """Counts of a whole-cell formula such as `Na4Cl4` or `Na4 Cl4`, in its order; no count is 1.

    Raises:
        CIFError: not a formula, an element without a token, a count that is zero or not whole.
    """
    text = "".join(formula.split())
    if not text:
        raise CIFError("the composition is empty: write a whole cell's formula such as Na4Cl4")
    counts: dict[str, int] = {}
    place = 0
    while place < len(text):
        part = _PART.match(text, place)
        if part is None:
            raise CIFError(
                f"composition {shorten(formula)} is no formula from {shorten(text[place:])} on: "
                "write elements with whole counts such as Na4Cl4"
            )
        symbol, count = part.groups()
        check_element(symbol)
        if "." in count:
            raise CIFError(
                f"composition {shorten(formula)} has the count {count} of {symbol}: counts are whole numbers"
            )
        if len(count) > _MAX_DIGITS:
            raise CIFError(f"composition {shorten(formula)} has a count of over {_MAX_DIGITS} digits")
        if count and int(count) == 0:
            raise CIFError(
                f"composition {shorten(formula)} has no {symbol}: leave it out or count at least 1"
            )
        counts[symbol] = counts.get(symbol, 0) + int(count or 1)
        place = part.end()
    return counts


def formula_order(symbols: Iterable[str]) -> list[str]:
    """Symbols in the order of the `data_` line, as the published corpus has it.

    By electronegativity, equal ones by symbol. He, Ne and Ar have none: the published sort then compared them
    with the others by name, so each stands before the first element whose symbol follows its own
    (`He12Si12O24`).

    Raises:
        KeyError: a symbol outside `ELEMENTS`.
    """
    elements = sorted((ELEMENTS[symbol] for symbol in symbols), key=lambda element: element.property_sort_key)
    ordered = [element.symbol for element in elements if element.electronegativity is not None]
    for unranked in (element.symbol for element in elements if element.electronegativity is None):
        place = next((i for i, symbol in enumerate(ordered) if symbol > unranked), len(ordered))
        ordered.insert(place, unranked)
    return ordered


def cell_formula(counts: Mapping[str, int], separator: str = "") -> str:
    """The whole-cell formula with every count written (`Na4Cl4`), elements in the corpus's order."""
    return separator.join(f"{symbol}{counts[symbol]}" for symbol in formula_order(counts))


def reduced_formula(counts: Mapping[str, int]) -> tuple[str, float]:
    """The reduced formula as pymatgen writes it (`Ca(NO3)2`), and how often the cell holds it.

    The number is a half where a formula that stays doubled (`O2`) is in the cell an odd number of times.
    """
    formula, factor = _reduce(counts)
    if formula in _DOUBLED:
        return _DOUBLED[formula], factor / 2
    return formula, factor


def _reduce(counts: Mapping[str, int]) -> tuple[str, int]:
    symbols = formula_order(counts)
    factor = math.gcd(*counts.values())
    anion = ""
    if (
        len(symbols) >= 3
        and _electronegativity(symbols[-1]) - _electronegativity(symbols[-2]) < _POLYANION_DIFFERENCE
    ):
        part, times = _reduce({symbol: counts[symbol] // factor for symbol in symbols[-2:]})
        if times != 1:
            anion = f"({part}){times}"
            symbols = symbols[:-2]
    amounts = {symbol: counts[symbol] // factor for symbol in symbols}
    return "".join(symbol + (str(n) if n != 1 else "") for symbol, n in amounts.items()) + anion, factor


def _electronegativity(symbol: str) -> float:
    value = ELEMENTS[symbol].electronegativity
    return math.nan if value is None else value
