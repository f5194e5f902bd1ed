"""From a symmetrised CIF to the standardised text that is tokenised."""

import re
from collections.abc import Iterable, Mapping
from functools import cache

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.cif.oxidation import (
    complete_oxidation_states,
    printed_radius,
    printed_state,
    take_oxidation_states,
)
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG
from crystallm_jax.errors import CIFError

_FORMULA_UNITS = re.compile(r"_cell_formula_units_Z\s+([.0-9]+)")
_FORMULA_LINE = re.compile(r"_chemical_formula_sum\s+(.+)\n")
_FORMULA_SUM = re.compile(r"_chemical_formula_sum\s+(?:'([^']+)'|(\S+))")
_DATA_LINE = re.compile(r"data_.*?\n")
_OPERATIONS_TAG = "_symmetry_equiv_pos_as_xyz\n"
_OPERATIONS_END = re.compile(r"\n(?:\S| \S)")
_IDENTITY_ROW = "  1  'x, y, z'"
_DIGITS = "0123456789"
_SIGNS = frozenset("+-")

_PROPERTY_HEADER = """loop_
 _atom_type_symbol
 _atom_type_electronegativity
 _atom_type_radius
 _atom_type_ionic_radius
"""


_OXIDATION_KEY = " _atom_type_oxidation_number\n"
_PROPERTY_ROWS = {
    e.symbol: (
        e.property_sort_key,
        f"  {e.symbol}  {e.printed_electronegativity}  {e.printed_atomic_radius}  {e.printed_ionic_radius}",
    )
    for e in ELEMENTS.values()
}


def property_block(symbols: Iterable[str], oxidation_states: Mapping[str, float] | None = None) -> str:
    """The loop of element properties: symbol, electronegativity, atomic radius, average ionic radius.

    Sorted by electronegativity; it ends without a line end. With the oxidation state of each element these
    are a last column, and the ionic radii those of the states, by the table of the installed pymatgen.

    Raises:
        KeyError: a symbol outside `ELEMENTS`, or without a state where states are given.
    """
    if oxidation_states is None:
        rows = [row for _, row in sorted([_PROPERTY_ROWS[symbol] for symbol in symbols])]
        return _PROPERTY_HEADER + "\n".join(rows)
    elements = sorted((ELEMENTS[symbol] for symbol in symbols), key=lambda element: element.property_sort_key)
    rows = []
    for e in elements:
        state = oxidation_states[e.symbol]
        fields = (e.symbol, e.printed_electronegativity, e.printed_atomic_radius)
        rows.append("  ".join(("", *fields, printed_radius(e.symbol, state), printed_state(state))))
    return _PROPERTY_HEADER + _OXIDATION_KEY + "\n".join(rows)


def preprocess_cif(
    text: str, decimal_places: int = 4, oxidation_states: bool | Mapping[str, float] = False
) -> str:
    """Standardise a symmetrised CIF text, as the published preparation does.

    In this order: the whole-cell formula on the `data_` line; the operations cut to the identity; the block
    of element properties before the space group; numbers with more decimals rounded.

    Args:
        text: what `symmetrized_cif` gives.
        decimal_places: decimals that stay.
        oxidation_states: give the property block a last column `_atom_type_oxidation_number`, and the ionic
            radius of that state. True takes what the text states (a loop of oxidation numbers, or charged
            site symbols such as `Na+`; the charges go from the text) and otherwise guesses the likeliest
            states that balance the formula, by pymatgen, 0 for an element alone; a mapping of symbols to
            states is taken as it is, for texts such as those of `symmetrized_cif`, which state none. An
            element in several states has their mean, and its average radius. States and radii guessed or
            looked up are those of the installed pymatgen.

    Raises:
        CIFError: number of formula units, formula or space group missing, an element without a token, counts
            that are not whole; no oxidation states that balance, or an element that the mapping lacks.
    """
    if not 0 <= decimal_places <= 15:
        raise CIFError(f"decimal_places={decimal_places} is outside 0 to 15")
    stated: Mapping[str, float] | None = None
    if oxidation_states is not False:
        text, stated = take_oxidation_states(text)
    _check_formula_units(text)
    text = _name_by_formula(text)
    text = _cut_operations(text)
    counts = _formula_counts(text)
    if isinstance(oxidation_states, Mapping):
        stated = _states_of(counts, oxidation_states)
    elif stated is not None:
        stated = complete_oxidation_states(counts, stated)
    text = _insert_block(text, property_block(counts, stated))
    return _round_numbers(text, decimal_places)


def stream_text(preprocessed: str) -> str:
    """The text that is tokenised: lines stripped, without empty ones, comments and mentions of pymatgen.

    Two line ends end it.
    """
    lines = (line.strip() for line in preprocessed.split("\n"))
    kept = [line for line in lines if line and not line.startswith("#") and "pymatgen" not in line]
    return "\n".join([*kept, "\n"])


def _check_formula_units(text: str) -> None:
    match = _FORMULA_UNITS.search(text)
    if match is None:
        raise CIFError(
            "_cell_formula_units_Z is missing: symmetrise the structure with symmetrized_cif first"
        )
    if not match[1].isdecimal() or not match[1].strip("0"):
        raise CIFError(
            f"_cell_formula_units_Z is {match[1]}: a cell holds a whole number of formula units, at least 1"
        )


def _name_by_formula(text: str) -> str:
    match = _FORMULA_LINE.search(text)
    if match is None:
        raise CIFError(
            "_chemical_formula_sum is missing: symmetrise the structure with symmetrized_cif first"
        )
    formula = match[1].replace("'", "").replace(" ", "")
    return f"data_{formula}\n".join(_DATA_LINE.split(text))


def _formula_counts(text: str) -> dict[str, int]:
    match = _FORMULA_SUM.search(text)
    if match is None:
        raise CIFError("_chemical_formula_sum is empty: symmetrise the structure with symmetrized_cif first")
    return parse_formula(match[1] or match[2])


def _states_of(counts: Mapping[str, int], given: Mapping[str, float]) -> Mapping[str, float]:
    missing = ", ".join(symbol for symbol in counts if symbol not in given)
    if missing:
        raise CIFError(f"oxidation_states lacks {missing}: give every element of the cell one")
    return given


def _insert_block(text: str, block: str) -> str:
    before, tag, after = text.partition(SPACEGROUP_TAG)
    if not tag:
        raise CIFError(f"{SPACEGROUP_TAG} is missing: symmetrise the structure with symmetrized_cif first")
    return f"{before}{block}\n{tag}{after}"


def _cut_operations(text: str) -> str:
    """The text with the identity alone after each tag of operations, up to the next line of another kind."""
    parts = []
    rest = 0
    while (found := text.find(_OPERATIONS_TAG, rest)) >= 0:
        rows = found + len(_OPERATIONS_TAG)
        end = _OPERATIONS_END.search(text, rows)
        if end is None:
            break
        parts += [text[rest:rows], _IDENTITY_ROW]
        rest = end.start()
    return "".join([*parts, text[rest:]])


def _round_numbers(text: str, decimal_places: int) -> str:
    """The text with numbers of more decimals rounded; an exponent counts among the decimals, as published."""
    # Nearly all numbers stand behind two blanks and before white space: found whole, and written at once.
    parts = _column_number(decimal_places).split(text)
    numbers = parts[1::2]
    row = f"|  %.{decimal_places}f" * len(numbers) % tuple(map(float, numbers))
    parts[1::2] = row.split("|")[1:]
    text = "".join(parts)
    fraction = _long_fraction(decimal_places)
    return _round_others(text, decimal_places, fraction=fraction) if fraction.search(text) else text


def _round_others(text: str, decimal_places: int, *, fraction: re.Pattern[str]) -> str:
    """Round numbers wherever they stand: found by their fractions, the whole part is the end of what precedes.

    A pattern of the whole number would be tried at every digit of the text.
    """
    parts = fraction.split(text)
    for i in range(1, len(parts), 2):
        before, decimals = parts[i - 1 : i + 1]
        if len(decimals) - 1 <= decimal_places:
            continue
        head = before.rstrip(_DIGITS)
        if head[-1:] in _SIGNS:
            head = head[:-1]
        elif head[-1:] == ".":
            # What stands before is a fraction itself, as in 1.5.123456.
            head = before
        parts[i - 1] = head
        parts[i] = f"{float(before[len(head) :] + decimals):.{decimal_places}f}"
    return "".join(parts)


@cache
def _column_number(decimal_places: int) -> re.Pattern[str]:
    return re.compile(rf"(  -?[0-9]++\.[0-9]{{{decimal_places + 1},}}+)(?=\s)")


@cache
def _long_fraction(decimal_places: int) -> re.Pattern[str]:
    return re.compile(rf"(\.(?:[0-9]++[eE][-+]?[0-9]+|[0-9]{{{decimal_places + 1},}}))")
