"""Bond lengths against the sums of radii, on CrystalNN's neighbours, once an orbit of equivalent sites."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure
from pymatgen.core.operations import SymmOp

from crystallm_jax.cif.elements import ELEMENTS, Element
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation.parsing import MAX_SITES, TooLargeError

try:
    from pymatgen.core.local_env import CrystalNN
except ImportError:  # before 2026
    from pymatgen.analysis.local_env import CrystalNN

TOLERANCE = 0.32  # share of the expected length, as published
HYDROGEN_FACTOR = 2.5
IONIC_DIFFERENCE = 1.7  # Pauling
MAX_NEIGHBOURS = 20_000  # points of one Voronoi tessellation; a crystal has some hundreds within 7 Å
EXACT = 1e-8  # an operator that maps the sites and the metric onto themselves this closely is a symmetry


class DeadlineError(CIFError):
    """The time limit passed before every bond was measured."""


class _GuardedStructure(Structure):
    """A structure that refuses neighbour searches which would take too long.

    CrystalNN doubles its search radius, up to the cell's diagonal, while a Voronoi cell stays open; in a cell
    of extreme shape a single site could take minutes, so that a check between sites would come too late.
    """

    deadline: float = math.inf

    def get_sites_in_sphere(self, pt: Any, r: float, **kwargs: Any) -> Any:
        if time.monotonic() > self.deadline:
            raise DeadlineError("the bonds were not measured within the time limit: raise time_limit")
        expected = 4 / 3 * math.pi * r**3 * len(self) / self.volume
        if expected > MAX_NEIGHBOURS:
            raise TooLargeError(
                f"about {expected:,.0f} atoms within {r:.3g} Å: at most {MAX_NEIGHBOURS:,} are handled"
            )
        return super().get_sites_in_sphere(pt, r, **kwargs)


def bond_length_score(
    structure: Structure, operators: Sequence[SymmOp] = (), *, deadline: float = math.inf
) -> float:
    """The share of bonds within 32 % of the expected length (with hydrogen: below 2.5 times it), 0 to 1.

    Neighbours are CrystalNN's; a bond between an atom and its own image does not count; every bond counts
    from both ends. Sites that an exact symmetry of the structure maps on each other have the same bonds, so
    one of them is measured and weighted with their number.

    Args:
        structure: At most 1,000 ordered sites.
        operators: Candidate symmetries, fractional; those that are none are ignored.
        deadline: On the clock of `time.monotonic`.

    Raises:
        DeadlineError: The deadline passed.
        TooLargeError: More than 1,000 sites, or a search for neighbours among more than 20,000 atoms.
        CIFError: No bond counts, a site is disordered, or an element has no radius.
    """
    if len(structure) > MAX_SITES:
        raise TooLargeError(
            f"the structure holds {len(structure):,} sites: at most {MAX_SITES:,} are handled"
        )
    if not structure.is_ordered:
        raise CIFError("a site is partly occupied: bonds are measured between whole atoms only")
    guarded = _GuardedStructure(structure.lattice, structure.species, structure.frac_coords)
    guarded.deadline = deadline
    orbits = symmetry_orbits(structure, operators)
    representatives, sizes = np.unique(orbits, return_counts=True)
    good = total = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CrystalNN asks for oxidation states at every bond
        for index, size in zip(representatives.tolist(), sizes.tolist(), strict=True):
            bonds = _bonds_of_site(guarded, index)
            good += size * sum(bonds)
            total += size * len(bonds)
    if total == 0:
        raise CIFError("no bonds were found: the atoms are too far apart")
    return good / total


def symmetry_orbits(structure: Structure, operators: Sequence[SymmOp]) -> NDArray[np.int64]:
    """The smallest index of an equivalent site, for each site [sites].

    Two sites are equivalent if an operator that keeps the metric and maps every site onto a site of the same
    species, both to 1e-8, maps one on the other, or a chain of such operators does.
    """
    roots = np.arange(len(structure))
    positions = structure.frac_coords
    metric = structure.lattice.matrix @ structure.lattice.matrix.T
    species = np.array([site.species_string for site in structure])
    keys = _cell_keys(positions)
    order = np.argsort(keys)
    if len(np.unique(keys)) < len(keys):
        return roots  # sites on top of each other: which is whose image cannot be told
    symmetries = []
    for operator in operators:
        rotation = operator.rotation_matrix
        if np.abs(rotation.T @ metric @ rotation - metric).max() > EXACT * metric.max():
            continue
        mapped = positions @ rotation.T + operator.translation_vector
        images = order[np.searchsorted(keys, _cell_keys(mapped), sorter=order) % len(order)]
        offsets = mapped - positions[images]
        exact = (np.abs(offsets - np.round(offsets)) < EXACT).all()
        if exact and len(np.unique(images)) == len(images) and (species[images] == species).all():
            symmetries.append(images)
    # Symmetries permute the sites, so that the smallest index of an orbit reaches all of it.
    settled = not symmetries
    while not settled:
        lowest = np.min([roots[images] for images in symmetries], axis=0)
        settled = bool((lowest >= roots).all())
        roots = np.minimum(roots, lowest)
    return roots


def expected_bond_length(first: str, second: str) -> float:
    """The expected distance of two bonded elements in Å, from their symbols.

    The sum of atomic radii; where the electronegativities differ by 1.7 or more, the average cationic radius
    of the less and the average anionic radius of the more electronegative one.

    Raises:
        CIFError: An element is not in the table or has no atomic radius (He, Ne, Kr, Xe).
    """
    one, other = _element(first), _element(second)
    if one.electronegativity is not None and other.electronegativity is not None:
        if one.electronegativity - other.electronegativity >= IONIC_DIFFERENCE:
            return other.average_cationic_radius + one.average_anionic_radius
        if other.electronegativity - one.electronegativity >= IONIC_DIFFERENCE:
            return one.average_cationic_radius + other.average_anionic_radius
    return _atomic_radius(one) + _atomic_radius(other)


def _element(symbol: str) -> Element:
    if symbol not in ELEMENTS:
        raise CIFError(f"{symbol} is not in the table of elements: bonds with it cannot be judged")
    return ELEMENTS[symbol]


def _atomic_radius(element: Element) -> float:
    if element.atomic_radius is None:
        raise CIFError(f"{element.symbol} has no atomic radius: bonds with it cannot be judged")
    return element.atomic_radius


def _bonds_of_site(structure: Structure, index: int) -> list[bool]:
    """Whether the length is acceptable, of each counted bond of one site."""
    site = structure[index]
    bonds = []
    for neighbour in CrystalNN().get_nn_info(structure, index):
        if neighbour["site_index"] == index:
            continue
        other = neighbour["site"]
        symbols = site.specie.symbol, other.specie.symbol
        expected = expected_bond_length(*symbols)
        if expected == 0:
            raise CIFError(
                f"the radii of {symbols[0]} and {symbols[1]} add up to 0: the bond cannot be judged"
            )
        ratio = float(site.distance(other)) / expected
        bonds.append(ratio < HYDROGEN_FACTOR if "H" in symbols else 1 - TOLERANCE < ratio < 1 + TOLERANCE)
    return bonds


def _cell_keys(coordinates: NDArray[np.float64]) -> NDArray[np.int64]:
    """The cell of a periodic grid of 1e-6 in which each position lies, as one number.

    The offset keeps coordinates of four decimals, with halves, thirds and quarters added, off the borders;
    what lies on one all the same costs a symmetry, and no wrong one is found.
    """
    cells = np.floor((coordinates % 1.0) * 1e6 + 0.4).astype(np.int64) % 1_000_000
    return (cells[..., 0] * 1_000_000 + cells[..., 1]) * 1_000_000 + cells[..., 2]
