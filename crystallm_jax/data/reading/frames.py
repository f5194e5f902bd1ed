"""From a record of any form to a pymatgen structure.

The structure is as `parse_structure` gives it for a CIF of the same crystal: the standard setting of the axes,
coordinates of 8 decimals, sites sorted by electronegativity, no charges. Whatever a text names, nothing but
numbers and element symbols is taken from it.
"""

import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from crystallm_jax.cif import ELEMENTS
from crystallm_jax.cif.symmetry import MAX_ATOMS
from crystallm_jax.data.reading.structures import parse_structure
from crystallm_jax.data.record import Record
from crystallm_jax.errors import CIFError

_OCCUPANCY_TOLERANCE = 1e-8
_SMALLEST_VOLUME = 0.1
# In Å; far beyond any crystal, and products of such numbers are finite.
_FARTHEST = 1e6
_DECIMALS = 8
# pymatgen's, when it reads a CIF.
_THIRD_TOLERANCE = 1e-4
# A species as pymatgen writes one where it is a text: "Fe", "Fe3+", "Fe0+".
_SPECIES = re.compile(r"([A-Z][a-z]?)(?:\d*\.?\d*[+-])?")
# What ASE and NumPy raise on frames that are not as they should be.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def structure_of(record: Record) -> Structure:
    """Read the one structure of a record, whatever its form.

    Raises:
        CIFError: whatever is wrong with the text; not periodic in three dimensions, an element without a
            token, a site that is not fully occupied, more than 2,000 atoms.
    """
    if record.form == "extxyz":
        return _read_frame(record.text)
    if record.form == "json":
        return _read_json(record.text)
    return parse_structure(record.text)


def _read_frame(text: str) -> Structure:
    from ase.io import read  # noqa: PLC0415  half a second

    first = text.partition("\n")[0].strip()
    _refuse_too_many(int(first[:18]) if first.isdecimal() else 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            atoms = read(io.StringIO(text), format="extxyz", index=0)
        matrix, positions = np.array(atoms.cell), atoms.get_positions()
        symbols, periodic = atoms.get_chemical_symbols(), atoms.get_pbc()
    except _MALFORMED as error:
        raise _no_structure("the frame", error) from error
    if not all(periodic):
        raise CIFError(
            "the frame is not periodic in three dimensions (Lattice and pbc): crystals alone are taken"
        )
    return _build(matrix, symbols, positions=positions)


def _read_json(text: str) -> Structure:
    try:
        row = json.loads(text)
        return _from_columns(row) if "lattice_vectors" in row else _from_dict(row)
    except CIFError:
        raise
    except (*_MALFORMED, RecursionError) as error:
        raise _no_structure("the JSON object", error) from error


def _from_columns(row: Mapping[str, Any]) -> Structure:
    symbols = _list(row["species_at_sites"])
    _refuse_too_many(len(symbols))
    periodic = row.get("dimension_types", (1, 1, 1))
    if list(periodic) != [1, 1, 1]:
        raise CIFError(
            f"dimension_types={list(periodic)[:3]}: crystals periodic in three dimensions alone are taken"
        )
    return _build(
        _numbers(row["lattice_vectors"]), symbols, positions=_numbers(row["cartesian_site_positions"])
    )


def _from_dict(row: Mapping[str, Any]) -> Structure:
    """The structure of pymatgen's `as_dict()`, of which "@module" and "@class" are not looked at."""
    lattice, sites = row["lattice"], _list(row["sites"])
    _refuse_too_many(len(sites))
    if not all(lattice.get("pbc") or (True,)):
        raise CIFError("the lattice is not periodic in three dimensions (pbc): crystals alone are taken")
    matrix = _numbers(lattice["matrix"]) if "matrix" in lattice else _matrix(lattice)
    symbols = [_symbol_of(site, number) for number, site in enumerate(sites, start=1)]
    if all("abc" in site for site in sites):
        return _build(matrix, symbols, fractions=_numbers([site["abc"] for site in sites]))
    return _build(matrix, symbols, positions=_numbers([site["xyz"] for site in sites]))


def _matrix(lattice: Mapping[str, Any]) -> np.ndarray:
    names = ("a", "b", "c", "alpha", "beta", "gamma")
    cell = _numbers([lattice[name] for name in names])
    return np.array(Lattice.from_parameters(*cell.tolist()).matrix)


def _symbol_of(site: Mapping[str, Any], number: int) -> str:
    species = _list(site["species"])
    if len(species) != 1 or abs(float(species[0].get("occu", 1)) - 1) > _OCCUPANCY_TOLERANCE:
        raise CIFError(f"site {number} is partially occupied or shared: leave it out")
    name = str(species[0]["element"])
    match = _SPECIES.fullmatch(name)
    return match[1] if match else name


def _build(
    matrix: np.ndarray,
    symbols: Sequence[Any],
    *,
    positions: np.ndarray | None = None,
    fractions: np.ndarray | None = None,
) -> Structure:
    """A structure of lattice vectors [3, 3] in Å and the sites' cartesian or fractional coordinates [N, 3]."""
    coordinates = positions if fractions is None else fractions
    if (
        coordinates is None
        or matrix.shape != (3, 3)
        or coordinates.shape != (len(symbols), 3)
        or not len(symbols)
    ):
        raise CIFError(
            "lattice vectors, elements and coordinates do not belong together: check the structure"
        )
    if not np.all(np.abs(matrix) <= _FARTHEST) or not np.all(np.abs(coordinates) <= _FARTHEST):
        raise CIFError("a lattice vector or coordinate is no number within reason: check the structure")
    for symbol in symbols:
        if not isinstance(symbol, str) or symbol not in ELEMENTS:
            raise CIFError(f"{str(symbol)[:40]!r} has no token: leave the structure out")
    volume = float(np.linalg.det(matrix))
    if not abs(volume) >= _SMALLEST_VOLUME:
        raise CIFError(f"the cell has a volume of {abs(volume):.3g} Å³: check the lattice vectors")
    if fractions is None:
        coordinates = np.linalg.solve(matrix.T, coordinates.T).T
    if volume < 0:
        # Cell lengths and angles say nothing of handedness; turned about, the same crystal has a right-handed cell.
        matrix, coordinates = -matrix, -coordinates
    coordinates = _as_in_a_cif(coordinates)
    lattice = Lattice.from_parameters(*Lattice(matrix).parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements without an electronegativity
        return Structure(lattice, list(symbols), coordinates).get_sorted_structure()


def _as_in_a_cif(fractions: np.ndarray) -> np.ndarray:
    """Fractions [N, 3] as they come out of a CIF: 8 decimals, thirds exact, from 0 to 1.

    Rounding noise of cartesian coordinates would decide which of several equal sites a text shows.
    """
    fractions = np.round(fractions - np.floor(fractions), _DECIMALS)
    for third in (1 / 3, 2 / 3):
        fractions = np.where(np.abs(fractions / third - 1) <= _THIRD_TOLERANCE, third, fractions)
    return fractions - np.floor(fractions)


def _refuse_too_many(atoms: int) -> None:
    if atoms > MAX_ATOMS:
        raise CIFError(f"the cell has {atoms:,} atoms, at most {MAX_ATOMS:,} are taken: leave it out")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} where a list was expected")
    return value


def _numbers(values: Any) -> np.ndarray:
    array = np.array(values)
    if array.dtype.kind not in "iuf":
        raise ValueError("what is no number among lattice vectors or coordinates")
    return array.astype(np.float64)


def _no_structure(what: str, error: BaseException) -> CIFError:
    reason = " ".join(str(error).split())[:200]
    kind = type(error).__name__
    return CIFError(f"no structure could be read from {what} ({kind}: {reason}): check it")
