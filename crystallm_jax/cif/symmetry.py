"""From a structure to a symmetrised CIF text: conventional cell, one representative an orbit."""

import textwrap
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.formula import cell_formula, check_element, formula_order, reduced_formula
from crystallm_jax.cif.spacegroups import find_spacegroup
from crystallm_jax.errors import CIFError

if TYPE_CHECKING:
    from pymatgen.core import Structure

MAX_ATOMS = 2000

# pymatgen's default, which the corpus was made with.
_ANGLE_TOLERANCE = 5.0
_LINE_LENGTH = 70

# The share of symprec up to which a refined cell counts as the given one. Of 38,619 crystals (Materials
# Project, Perov-5, Carbon-24, AFLOW prototypes) all whose refined cell is more symmetric were moved by more than
# a tenth of symprec at 0.1 Å, and of 4,812 by more than a hundredth at 0.003 to 0.2 Å.
_UNMOVED = 0.002
_FIRST_CUBIC = 195


class _Group(NamedTuple):
    """Symmetry of a refined cell: the orbit of each site [N] (any label) and the lines of the operations."""

    orbits: np.ndarray
    operation_lines: Sequence[str]


def symmetrized_cif(structure: "Structure", symprec: float = 0.1) -> str:
    """Write a structure as the corpus has it: refined conventional cell, operations, one site an orbit.

    The text is that of pymatgen's `CifWriter(structure, symprec=symprec)` as of 2023.3.23, down to its first
    line. It names the space group of the structure itself; operations and orbits are those of the refined
    cell, which may be more symmetric. Charges and spins are dropped.

    Args:
        structure: an ordered pymatgen Structure of at most 2,000 atoms.
        symprec: tolerance of the symmetry search in ångström.

    Raises:
        CIFError: partial occupancies, an element or a space group without a token, too many atoms, or a cell
            whose symmetry cannot be determined.
    """
    if not symprec > 0:
        raise CIFError(f"symprec={symprec} is not a positive length in ångström")
    symbols = _element_symbols(structure)
    order = {symbol: i for i, symbol in enumerate(formula_order(set(symbols)))}
    given = _dataset(structure.lattice.matrix, structure.frac_coords, [order[s] for s in symbols], symprec)
    name = find_spacegroup(given.international)
    _check_size(len(given.std_types))
    by_kind = np.argsort(given.std_types, kind="stable")
    positions, kinds = given.std_positions[by_kind], given.std_types[by_kind]
    if _has_setting(given) and _deviation(structure, given) <= _UNMOVED * symprec:
        group = _implied_group(given, by_kind)
    else:
        group = _searched_group(given.std_lattice, positions, kinds=kinds, symprec=symprec)
    ranked = list(order)
    elements = [ranked[kind] for kind in kinds]
    levels = np.array(_levels(ranked))[kinds]
    sites = _orbits(positions, levels, group.orbits)
    rows = [
        (elements[i], f"{elements[i]}{n}", str(multiplicity), *map("{:.8f}".format, positions[i]), "1.0")
        for n, (i, multiplicity) in enumerate(sites)
    ]
    counts = {symbol: elements.count(symbol) for symbol in ranked}
    return "\n".join(
        [
            "# generated using pymatgen",
            *_cell_lines(given.std_lattice, counts, name, given.number),
            *group.operation_lines,
            *_site_lines(rows),
            "",
        ]
    )


def _element_symbols(structure: "Structure") -> list[str]:
    """Element of each site, without charge.

    Raises:
        CIFError: a site that is not wholly one element with a token; too many sites or none.
    """
    if len(structure) == 0:
        raise CIFError("the structure has no atoms")
    _check_size(len(structure))
    # Sites mostly share the compositions of their elements, so each is looked into once.
    compositions = [site.species for site in structure]
    known: dict[int, str] = {}
    symbols = []
    for i, composition in enumerate(compositions):
        if id(composition) not in known:
            if not composition.num_atoms == len(composition) == 1:
                raise CIFError(
                    f"site {i} holds {structure[i].species_string}: partial occupancies cannot be written, "
                    "order the structure first"
                )
            specie = next(iter(composition))
            element = getattr(specie, "element", specie)
            # The name of deuterium is D, its symbol H.
            known[id(composition)] = getattr(element, "name", None) or element.symbol
        symbols.append(known[id(composition)])
    for symbol in dict.fromkeys(symbols):
        check_element(symbol)
    return symbols


def _check_size(atoms: int) -> None:
    if atoms > MAX_ATOMS:
        raise CIFError(
            f"the cell holds {atoms} atoms, more than {MAX_ATOMS}: no model's context holds such a text"
        )


def _dataset(
    lattice: np.ndarray, positions: np.ndarray, kinds: Sequence[int] | np.ndarray, symprec: float
) -> Any:
    """Symmetry data set of a cell as spglib finds it.

    Raises:
        CIFError: it finds none.
    """
    import spglib  # noqa: PLC0415 - keeps the tokenizer's import instant

    if not (np.isfinite(lattice).all() and np.isfinite(positions).all()):
        raise CIFError("the structure has cell vectors or coordinates that are not finite: check it")
    try:
        # spglib 2.7 and later warn at every call that they report a failure as None.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            dataset = spglib.get_symmetry_dataset(
                (lattice, positions, kinds), symprec=symprec, angle_tolerance=_ANGLE_TOLERANCE
            )
    except spglib.SpglibError as error:
        raise CIFError(f"symmetry could not be determined at symprec {symprec}: {error}") from error
    if dataset is None:
        raise CIFError(
            f"symmetry could not be determined at symprec {symprec} (atoms too close, or a flat cell): "
            "check the structure"
        )
    return dataset


def _has_setting(given: Any) -> bool:
    """Whether the space group can tell the operations of the refined cell and their order.

    P1 moves nothing, so nothing is known of what a search of its reduced cell finds. In the lattices F and R
    below cubic the order hangs on the shape of the cell too.
    """
    return given.number > 1 and (given.international[0] not in "FR" or given.number >= _FIRST_CUBIC)


def _deviation(structure: "Structure", given: Any) -> float:
    """How far idealising moved the structure: the most that an atom or a cell vector moved, in ångström."""
    change = given.transformation_matrix
    lattice = np.linalg.inv(change).T @ structure.lattice.matrix @ given.std_rotation_matrix.T
    strain = np.abs(lattice - given.std_lattice).max()
    # The sites of the refined cell, a row for each site of the primitive cell that they are copies of.
    copies = np.argsort(given.std_mapping_to_primitive, kind="stable")
    copies = copies.reshape(given.std_mapping_to_primitive.max() + 1, -1)
    moved = structure.frac_coords @ change.T + given.origin_shift
    steps = given.std_positions[copies[given.mapping_to_primitive]] - moved[:, None]
    steps = (steps - np.rint(steps)) @ given.std_lattice
    return float(max(strain, np.sqrt(np.square(steps).sum(axis=-1).min(axis=-1).max())))


def _searched_group(
    lattice: np.ndarray, positions: np.ndarray, *, kinds: np.ndarray, symprec: float
) -> _Group:
    """The group of a refined cell by a search of its own, which may find more than the given cell has."""
    found = _dataset(lattice, positions, kinds, symprec)
    return _Group(found.equivalent_atoms, _operation_lines(found.rotations, found.translations))


def _implied_group(given: Any, by_kind: np.ndarray) -> _Group:
    """The group of a refined cell that is the given one but for noise, without a second search.

    `by_kind` [N] are the refined cell's sites in the order of the orbits.
    """
    orbit_of_primitive = np.empty(given.mapping_to_primitive.max() + 1, dtype=np.intp)
    orbit_of_primitive[given.mapping_to_primitive] = given.crystallographic_orbits
    return _Group(
        orbit_of_primitive[given.std_mapping_to_primitive[by_kind]], _setting_lines(given.hall_number)
    )


@lru_cache(maxsize=530)
def _setting_lines(hall_number: int) -> Sequence[str]:
    """The operation lines of one of spglib's 530 settings, as a search of a cell in that setting lists them."""
    import spglib  # noqa: PLC0415 - keeps the tokenizer's import instant

    # spglib 2.7 and later warn that they report a failure as None.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        operations = spglib.get_symmetry_from_database(hall_number)
    if operations is None:
        raise CIFError(f"the symmetry library knows no setting {hall_number}: reinstall spglib")
    rotations, translations = operations["rotations"], operations["translations"]
    centring = _centring(rotations, translations)
    if len(centring) > 2:
        # A search lists the same centring translations in another order, that of the empty cubic lattice.
        cube = _dataset(10 * np.eye(3), centring, [0] * len(centring), 0.1)
        found = _centring(cube.rotations, cube.translations)
        steps = found[:, None] - centring
        places = np.square(steps - np.rint(steps)).sum(axis=-1).argmin(axis=-1)
        order = np.arange(len(rotations)).reshape(len(centring), -1)[places].ravel()
        rotations, translations = rotations[order], translations[order]
    return tuple(_operation_lines(rotations, translations))


def _centring(rotations: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """The translations [centrings, 3] of the operations that turn nothing."""
    return translations[(rotations == np.eye(3)).all(axis=(1, 2))]


def _levels(symbols: Sequence[str]) -> list[int]:
    """Rank of each element of an ordered list: those with the same electronegativity share one."""
    values = [ELEMENTS[symbol].electronegativity for symbol in symbols]
    new = [value is None or value != before for before, value in pairwise([None, *values])]
    return list(accumulate(new))


def _orbits(positions: np.ndarray, levels: np.ndarray, equivalent: np.ndarray) -> list[tuple[int, int]]:
    """Representative site and multiplicity of each orbit, in the order of the text.

    By electronegativity (the level of each site's element), falling multiplicity, coordinates. The
    representative has the smallest absolute coordinates, compared exactly as the published writer does. Where
    sites tie (12 orbits of the 150 golden structures), the last bits of spglib's coordinates decide: the same
    structure always gives the same text with one spglib, and 98 % of the golden texts come out. A comparison
    with a tolerance would not depend on those bits, but gives 93 %.
    """
    coordinates = positions.tolist()
    keys = np.abs(positions).tolist()
    orbits = []
    for first in np.unique(equivalent):
        members = np.flatnonzero(equivalent == first).tolist()
        orbits.append((min(members, key=keys.__getitem__), len(members)))
    return sorted(orbits, key=lambda orbit: (levels[orbit[0]], -orbit[1], *coordinates[orbit[0]]))


def _cell_lines(lattice: np.ndarray, counts: dict[str, int], name: str, number: int) -> list[str]:
    from pymatgen.core import Lattice  # noqa: PLC0415 - keeps the tokenizer's import instant

    cell = Lattice(lattice)
    formula, units = reduced_formula(counts)
    fields = {
        "_symmetry_space_group_name_H-M": name,
        **{f"_cell_length_{axis}": f"{x:.8f}" for axis, x in zip("abc", cell.abc, strict=True)},
        **{
            f"_cell_angle_{n}": f"{x:.8f}"
            for n, x in zip(("alpha", "beta", "gamma"), cell.angles, strict=True)
        },
        "_symmetry_Int_Tables_number": str(number),
        "_chemical_formula_structural": formula,
        "_chemical_formula_sum": cell_formula(counts, separator=" "),
        "_cell_volume": f"{cell.volume:.8f}",
        "_cell_formula_units_Z": str(int(units)),
    }
    return [f"data_{formula}", *(_field_line(key, value) for key, value in fields.items())]


def _field_line(key: str, value: str) -> str:
    if len(value) > _LINE_LENGTH:
        return f"{key}\n;\n{textwrap.fill(value, _LINE_LENGTH)}\n;"
    quoted = f"'{value}'" if " " in value else value
    return f"{key}   {quoted}" if len(key) + len(quoted) + 3 < _LINE_LENGTH else f"{key}\n{quoted}"


def _operation_lines(rotations: np.ndarray, translations: np.ndarray) -> list[str]:
    lines = ["loop_", " _symmetry_equiv_pos_site_id", " _symmetry_equiv_pos_as_xyz"]
    for i, (rotation, translation) in enumerate(
        zip(rotations.tolist(), translations.tolist(), strict=True), 1
    ):
        parts = (_coordinate(*row, shift) for row, shift in zip(rotation, translation, strict=True))
        lines.append(f"  {i}  '{', '.join(parts)}'")
    return lines


@lru_cache(maxsize=4096)
def _coordinate(x: int, y: int, z: int, shift: float) -> str:
    """One coordinate of an operation such as `-x+1/2`; the shift in at most thousandths."""
    text = ""
    for factor, axis in ((x, "x"), (y, "y"), (z, "z")):
        if factor:
            sign = "-" if factor < 0 else "+" if text else ""
            text += f"{sign}{abs(factor) if abs(factor) != 1 else ''}{axis}"
    fraction = Fraction(shift).limit_denominator(1000)
    if fraction and abs(fraction) != 1:
        text += f"{'+' if fraction > 0 and text else ''}{fraction}"
    return text or "0"


def _site_lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    columns = ("type_symbol", "label", "symmetry_multiplicity", "fract_x", "fract_y", "fract_z", "occupancy")
    return [
        "loop_",
        *(f" _atom_site_{column}" for column in columns),
        *("  " + "  ".join(row) for row in rows),
    ]
