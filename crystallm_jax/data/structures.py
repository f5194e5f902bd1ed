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
from crystallm_jax.errors import CIFError

_CELL = tuple(
    f"_cell_{k}" for k in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
)
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
    *_CELL,
    "_symmetry_space_group_name_H-M",
    "_symmetry_Int_Tables_number",
    "_chemical_formula_structural",
    "_chemical_formula_sum",
    "_cell_volume",
    "_cell_formula_units_Z",
}
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_MISSING_KEY = re.compile(r"'_[\w.-]+'")
_FRACTIONS = (1 / 3, 2 / 3)
_FRACTION_TOLERANCE = 1e-4
# pymatgen merges sites within 1e-4 of each other; a little more, so that the edge is its decision.
_SAME_SITE = 1.1e-4
_THIN = 0.02


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
        CIFError: no structure, several structures, an unknown element, a site that is not fully occupied,
            more than 2,000 atoms.
    """
    _refuse_too_many(text.count("\n"), text)
    cell = read_plain_cell(text)
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
            if columns and not _is_identity_loop(columns, rows):
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
            if blocks > 1 or in_loop:
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
    cell = [values.get(key, "") for key in _CELL]
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
    return PlainCell(
        (a, b, c), (alpha, beta, gamma), symbols, labels, np.array(coordinates, dtype=np.float64).T.copy()
    )


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
    if (
        not np.all(np.isfinite(lattice.matrix))
        or not np.all(thickness > _THIN)
        or _any_same_site(coordinates)
    ):
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
        # The comparison with the stated formula only warns, and takes as long as the rest.
        parser = CifParser.from_str(text, check_cif=False)
        try:
            structures = parser.parse_structures(primitive=False, on_error="ignore")
        except ValueError as error:
            first = next((w for w in parser.warnings if w.startswith("No structure parsed")), "")
            reason = " ".join((first.partition("\n")[2] or str(error)).split())
            if _MISSING_KEY.fullmatch(reason):
                reason = f"it has no {reason}"
            raise CIFError(f"no structure could be read ({reason}): check the CIF") from error
    if len(structures) > 1:
        raise CIFError(f"the text holds {len(structures)} structures: give one record each")
    return _checked(structures[0])


def _checked(structure: Structure) -> Structure:
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


def _refuse_too_many(n_lines: int, text: str) -> None:
    """Refuse a text that lists too many atoms before the slow part, from its lines that look like atoms."""
    if n_lines <= MAX_ATOMS:
        return
    rows = sum(len(line.split()) >= 5 and line.lstrip()[:1].isalpha() for line in text.splitlines())
    if rows > MAX_ATOMS:
        raise CIFError(f"the text lists {rows:,} atoms, at most {MAX_ATOMS:,} are taken: leave it out")
