"""From a symmetrised CIF to the standardised text that is tokenised."""

import re
from collections.abc import Iterable

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG
from crystallm_jax.errors import CIFError

_FORMULA_UNITS = re.compile(r"_cell_formula_units_Z\s+([.0-9]+)")
_FORMULA_LINE = re.compile(r"_chemical_formula_sum\s+(.+)\n")
_FORMULA_SUM = re.compile(r"_chemical_formula_sum\s+(?:'([^']+)'|(\S+))")
_DATA_LINE = re.compile(r"data_.*?\n")
_OPERATIONS = re.compile(r"(_symmetry_equiv_pos_as_xyz\n).*?(?=\n(?:\S| \S))", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d*\.\d+([eE][-+]?\d+)?")

_PROPERTY_HEADER = """loop_
 _atom_type_symbol
 _atom_type_electronegativity
 _atom_type_radius
 _atom_type_ionic_radius
"""


def property_block(symbols: Iterable[str]) -> str:
    """The loop of element properties: symbol, electronegativity, atomic radius, average ionic radius.

    Sorted by electronegativity; it ends without a line end.

    Raises:
        KeyError: a symbol outside `ELEMENTS`.
    """
    elements = sorted((ELEMENTS[symbol] for symbol in symbols), key=lambda element: element.property_sort_key)
    return _PROPERTY_HEADER + "\n".join(
        f"  {e.symbol}  {e.printed_electronegativity}  {e.printed_atomic_radius}  {e.printed_ionic_radius}"
        for e in elements
    )


def preprocess_cif(text: str, decimal_places: int = 4, oxidation_states: bool = False) -> str:
    """Standardise a symmetrised CIF text, as the published preparation does.

    In this order: the whole-cell formula on the `data_` line; the operations cut to the identity; the block
    of element properties before the space group; numbers with more decimals rounded.

    Args:
        text: what `symmetrized_cif` gives.
        decimal_places: decimals that stay.
        oxidation_states: see the errors.

    Raises:
        CIFError: number of formula units, formula or space group missing, an element without a token, counts
            that are not whole; or oxidation states asked for: the published procedure reads them from the
            formula sum, where no CIF has them, and no released corpus holds any.
    """
    if oxidation_states:
        raise CIFError(
            "oxidation_states=True cannot be honoured: a CIF's _chemical_formula_sum carries no charges, and "
            "there is no published text with _atom_type_oxidation_number to equal; leave it out"
        )
    if not 0 <= decimal_places <= 15:
        raise CIFError(f"decimal_places={decimal_places} is outside 0 to 15")
    _check_formula_units(text)
    text = _name_by_formula(text)
    text = _OPERATIONS.sub(r"\1  1  'x, y, z'", text)
    text = _insert_properties(text)
    return _NUMBER.sub(lambda number: _rounded(number[0], decimal_places), text)


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
    return _DATA_LINE.sub(lambda _: f"data_{formula}\n", text)


def _insert_properties(text: str) -> str:
    match = _FORMULA_SUM.search(text)
    if match is None:
        raise CIFError("_chemical_formula_sum is empty: symmetrise the structure with symmetrized_cif first")
    block = property_block(parse_formula(match[1] or match[2]))
    before, tag, after = text.partition(SPACEGROUP_TAG)
    if not tag:
        raise CIFError(f"{SPACEGROUP_TAG} is missing: symmetrise the structure with symmetrized_cif first")
    return f"{before}{block}\n{tag}{after}"


def _rounded(number: str, decimal_places: int) -> str:
    if len(number.rsplit(".", maxsplit=1)[-1]) <= decimal_places:
        return number
    return f"{round(float(number), decimal_places):.{decimal_places}f}"
