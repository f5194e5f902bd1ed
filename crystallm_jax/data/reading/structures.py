"""From a CIF text to a pymatgen structure, once.

Corpora are mostly P1 texts that list every atom. pymatgen's reader is general and slow on them, so a strict
reader takes the texts that are plain in every respect, and gives the structure that pymatgen gives; it leaves
every other text to pymatgen.
"""

import math
import re
import warnings
from typing import NamedTuple

import numpy as np
from pymatgen.core import Composition, Element, Lattice, Structure
from pymatgen.io.cif import CifParser

from crystallm_jax.cif import ELEMENTS
from crystallm_jax.cif.symmetry import MAX_ATOMS
from crystallm_jax.data.reading.guards import (
    CELL,
    THIN,
    check_block,
    check_lattice,
    readable_text,
    refuse_too_many,
)
from crystallm_jax.errors import CIFError

_IDENTITY = re.compile(r"\s*(?:1\s+)?(['\"]?)x,\s*y,\s*z\1\s*")
_OPERATOR_KEYS = {"_symmetry_equiv_pos_site_id", "_symmetry_equiv_pos_as_xyz"}
_SITE_KEYS = {
    "_atom_site_type_symbol",
    "_atom_site_label",
    "_atom_site_symmetry_multiplicity",
    "_atom_site_fract_x",
    "_atom_site_fract_y",
    "_atom_site_fract_z",
    "_atom_site_occupancy",
}
_PLAIN_KEYS = {
    *CELL,
    "_symmetry_space_group_name_H-M",
    "_symmetry_Int_Tables_number",
    "_chemical_formula_structural",
    "_chemical_formula_sum",
    "_cell_volume",
    "_cell_formula_units_Z",
}
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?", re.ASCII)
_MISSING_KEY = re.compile(r"'_[\w.-]+'")
_FRACTIONS = (1 / 3, 2 / 3)
_FRACTION_TOLERANCE = 1e-4
# pymatgen merges sites within 1e-4 of each other; a little more, so that the edge is its decision.
_SAME_SITE = 1.1e-4
_LONGEST_REASON = 200
# What pymatgen was seen to raise on broken texts, in campaigns of tools/fuzz_cif.py: a loop without
# columns, an operator with a fourth coordinate or a zero below the line, an infinite coordinate, magnetic
# tags that are incomplete, a cell setting that is none. Anything else is a defect.
_PYMATGEN_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class PlainCell(NamedTuple):
    """A P1 cell as it is written: `lengths` (Å), `angles` (degrees), symbols, labels, coordinates [N, 3]."""

    lengths: tuple[float, float, float]
    angles: tuple[float, float, float]
    symbols: tuple[str, ...]
    labels: tuple[str, ...]
    coordinates: np.ndarray


def parse_structure(text: str) -> Structure:
    """Read the one structure of a CIF text as pymatgen does, without oxidation states being guessed.

    Raises:
        CIFError: no structure, several structures, an unknown element, a site that is not fully occupied or
            has no element, a cell without a volume, more than 2,000 atoms, a text so large or so full of
            quotes or operators that pymatgen would not come to an end. Nothing else is raised.
    """
    cell = read_plain_cell(text)
    if cell is not None:
        refuse_too_many(len(cell.symbols))
    structure = None if cell is None else _build(cell)
    if structure is None:
        structure = _parse_with_pymatgen(text)
    if len(structure) > MAX_ATOMS:
        raise CIFError(
            f"the cell has {len(structure):,} atoms, at most {MAX_ATOMS:,} are taken: leave it out"
        )
    return structure


def read_plain_cell(text: str) -> PlainCell | None:
    """Read a text that is plain P1 in pymatgen's own form; None for any other."""
    if not text.isascii():  # pymatgen takes other characters out, and with them a label, say
        return None
    values: dict[str, str] = {}
    columns: list[str] = []
    rows: list[list[str]] = []
    blocks = 0
    in_loop = in_rows = False
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line[0] == "#":
            continue
        if line == "loop_":
            if in_loop and not _is_identity_loop(columns, rows):
                return None
            columns, rows, in_loop, in_rows = [], [], True, False
        elif line[0] == "_":
            if in_loop and not in_rows:
                columns.append(line)
                continue
            key, _, value = line.partition(" ")
            if in_rows or key not in _PLAIN_KEYS or key in values:
                return None
            values[key] = value.strip()
        elif line.startswith("data_"):
            blocks += 1
            if blocks > 1 or in_loop or values:  # what stands before a block is not of it
                return None
        elif in_loop and columns:
            in_rows = True
            rows.append([line] if columns[0] in _OPERATOR_KEYS else line.split())
        else:
            return None
    return _plain_cell(values, columns, rows=rows) if blocks == 1 else None


def _is_identity_loop(columns: list[str], rows: list[list[str]]) -> bool:
    known = set(columns) <= _OPERATOR_KEYS and "_symmetry_equiv_pos_as_xyz" in columns
    if not known or len(rows) != 1:
        return False
    match = _IDENTITY.fullmatch(rows[0][0])
    return match is not None and (len(columns) == 1) == (not rows[0][0].startswith("1"))


def _plain_cell(values: dict[str, str], columns: list[str], *, rows: list[list[str]]) -> PlainCell | None:
    """Check what was read; None where anything is not as plain as it must be."""
    needed = {"_atom_site_type_symbol", "_atom_site_label", *(f"_atom_site_fract_{k}" for k in "xyz")}
    name = values.get("_symmetry_space_group_name_H-M", "").strip("'\"").replace(" ", "")
    plain = set(columns) <= _SITE_KEYS and needed <= set(columns) and len(set(columns)) == len(columns)
    if not plain or name != "P1" or not rows or any(len(row) != len(columns) for row in rows):
        return None
    cell = [values.get(key, "") for key in CELL]
    fields = dict(zip(columns, zip(*rows, strict=True), strict=True))
    coordinates = [fields[f"_atom_site_fract_{k}"] for k in "xyz"]
    occupancies = fields.get("_atom_site_occupancy", ())
    if not all(map(_NUMBER.fullmatch, (*cell, *(c for axis in coordinates for c in axis), *occupancies))):
        return None
    symbols, labels = fields["_atom_site_type_symbol"], fields["_atom_site_label"]
    if any(float(o) != 1.0 for o in set(occupancies)) or not set(symbols) <= ELEMENTS.keys():
        return None
    if any(c in label for label in labels for c in "'\"+;#"):
        return None
    a, b, c, alpha, beta, gamma = (float(number) for number in cell)
    positions = np.array(coordinates, dtype=np.float64).T.copy()
    if not np.isfinite(positions).all():  # 1e999 is written as a number too
        return None
    return PlainCell((a, b, c), (alpha, beta, gamma), symbols, labels, positions)


def _build(cell: PlainCell) -> Structure | None:
    """The structure that pymatgen gives; None where it would merge sites, refuse, or sort by no value."""
    if min(cell.lengths) <= 0.1 or min(cell.angles) < 5 or max(cell.angles) > 175:
        return None
    elements = {symbol: Element(symbol) for symbol in set(cell.symbols)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        negativity = {symbol: float(element.X) for symbol, element in elements.items()}
    if any(math.isnan(value) for value in negativity.values()):
        return None
    coordinates = cell.coordinates
    for fraction in _FRACTIONS:
        coordinates = np.where(
            np.abs(coordinates / fraction - 1) <= _FRACTION_TOLERANCE, fraction, coordinates
        )
    coordinates = coordinates + 0.0  # no negative zero
    coordinates = coordinates - np.floor(coordinates)
    lattice = Lattice.from_parameters(*cell.lengths, *cell.angles)
    thickness = 1 / np.linalg.norm(lattice.inv_matrix, axis=0)
    if not np.all(np.isfinite(lattice.matrix)) or not np.all(thickness > THIN) or _any_same_site(coordinates):
        return None
    order = sorted(range(len(cell.symbols)), key=lambda i: (negativity[cell.symbols[i]], cell.symbols[i]))
    species = {symbol: Composition({element: 1.0}) for symbol, element in elements.items()}
    return Structure(
        lattice,
        [species[cell.symbols[i]] for i in order],
        coordinates[order],
        labels=[cell.labels[i] for i in order],
    )


def _any_same_site(coordinates: np.ndarray) -> bool:
    """Whether two sites lie within the tolerance in all three fractions; memory grows with N, not N²."""
    for i in range(1, len(coordinates)):
        difference = coordinates[:i] - coordinates[i]
        difference -= np.round(difference)
        if np.any(np.all(np.abs(difference) < _SAME_SITE, axis=1)):
            return True
    return False


def _parse_with_pymatgen(text: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = _parser(readable_text(text))
        try:
            for items in parser.as_dict().values():
                check_block(items, parser)
            structures = parser.parse_structures(primitive=False, on_error="ignore")
        except CIFError:
            raise
        except _PYMATGEN_ERRORS as error:
            first = next((w for w in parser.warnings if w.startswith("No structure parsed")), "")
            raise _unreadable(error, first.partition("\n")[2]) from error
    if len(structures) > 1:
        raise CIFError(f"the text holds {len(structures)} structures: give one record each")
    return _checked(structures[0])


def _parser(text: str) -> CifParser:
    try:
        # The comparison with the stated formula only warns, and takes as long as the rest.
        return CifParser.from_str(text, check_cif=False)
    except ZeroDivisionError as error:
        raise _unreadable(error, "a loop_ has no tags, or no values for a whole row") from error
    except ValueError as error:
        raise _unreadable(error, "a loop_ has values left over that make no whole row") from error
    except _PYMATGEN_ERRORS as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception, noted: str = "") -> CIFError:
    """What pymatgen noted about a block, or else its error, as one line."""
    reason = " ".join((noted or str(error)).split())[:_LONGEST_REASON]
    if _MISSING_KEY.fullmatch(reason):
        reason = f"it has no {reason}"
    elif not (noted or type(error) is ValueError):
        reason = f"{type(error).__name__}: {reason}"
    return CIFError(f"no structure could be read ({reason or 'no reason given'}): check the CIF")


def _checked(structure: Structure) -> Structure:
    check_lattice(structure.lattice)
    if "implicit_hydrogens" in structure.site_properties:
        raise CIFError(
            "hydrogens are implied (as in Wat) and have no site: place them or leave the record out"
        )
    for site in structure:
        for species in site.species:
            symbol = getattr(species, "symbol", str(species))
            if symbol not in ELEMENTS:
                raise CIFError(
                    f"site {site.label!r} holds {symbol!r}, which has no token: leave the structure out"
                )
        if not site.is_ordered:
            raise CIFError(f"site {site.label!r} is partially occupied ({site.species_string}): leave it out")
    return structure
