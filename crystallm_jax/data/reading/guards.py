"""What pymatgen's CIF reader must not be given: texts that it misreads, or that it does not come to an end with.

The limits were found by `tools/fuzz_cif.py`; the texts that showed them lie under `tests/fixtures/fuzz`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pymatgen.core import Lattice
from pymatgen.core.operations import SymmOp
from pymatgen.io.cif import CifBlock, CifParser

from crystallm_jax.cif.symmetry import MAX_ATOMS
from crystallm_jax.errors import CIFError

CELL = tuple(
    f"_cell_{k}" for k in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
)
MAX_CHARACTERS = 10_000_000
# pymatgen looks for the end of each quote up to the end of its line: quotes × length of all long lines.
_MAX_QUOTE_STEPS = 20_000_000
_LONG_LINE = 2_048
_LONGEST_OPERATOR = 200  # the search for its parts takes quadratic time too
MAX_IMAGES = 50_000  # rows × operators; each is a step of Python in pymatgen
_FEW_IMAGES = 2_000  # so few are expanded within a second or two, whatever they are
_LARGEST_GROUP = 192
# A cell whose faces are so close is looked at again; below the other, Å, spglib takes minutes to hours.
THIN = 1.0
_SHORTEST_VECTOR = 0.1

_CELL_SETTINGS = ("_symmetry_cell_setting", "_space_group_crystal_system")
# pymatgen has sympy work it out, powers of any size too.
_TRANSFORMATION, _POWER = "_space_group_magn.transform_BNS_Pp_abc", "**"
# Where pymatgen looks for operators, in its order.
_OPERATOR_TAGS = tuple(
    f"{stem}{end}"
    for stem in ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
    for end in ("", "_")
)


def readable_text(text: str) -> str:
    """The text without blank lines, whose removal takes pymatgen quadratic time.

    Raises:
        CIFError: over 10,000,000 characters, or lines too long and too full of quotes.
    """
    if len(text) > MAX_CHARACTERS:
        raise CIFError(
            f"the text has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read: leave it out"
        )
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    long = [line for line in lines if len(line) > _LONG_LINE]
    if sum(len(line) * (line.count("'") + line.count('"')) for line in long) > _MAX_QUOTE_STEPS:
        raise CIFError(
            f"a line has {max(map(len, long)):,} characters and many quotes: break it, a CIF's lines have at "
            f"most {_LONG_LINE:,}"
        )
    return "\n".join(lines)


def check_block(items: Mapping[str, Any], parser: CifParser) -> None:
    """Refuse a block that pymatgen would misread, read in part or take too long to expand.

    Args:
        items: tag to value, or to a list of values where it stands in a loop.
        parser: what read them.

    Raises:
        CIFError: sites outside a loop (read letter by letter), a site without an element (left out without
            a word), no cell, too many sites or images. Also what pymatgen raises on broken operators.
    """
    check_transformation(items)
    operators = _listed_operators(items)  # pymatgen reads them before it looks for sites
    labels = items.get("_atom_site_label", ())
    if not labels:
        return
    missing = next((key for key in CELL if key not in items), None)
    if missing and not any(items.get(key) for key in _CELL_SETTINGS):
        raise CIFError(f"no structure could be read (it has no {missing!r}): check the CIF")
    symbols = items.get("_atom_site_type_symbol", labels)
    if isinstance(labels, str) or isinstance(symbols, str):
        raise CIFError("the atom sites stand outside a loop_: put their tags and values into one")
    for symbol in dict.fromkeys(symbols):
        if not symbol or not parser._parse_symbol(symbol):
            raise CIFError(
                f"a site's type symbol {symbol[:40]!r} names no element: correct it or leave it out"
            )
    refuse_too_many(len(labels))
    count = _LARGEST_GROUP if operators is None else len(operators)
    _check_images(items, parser, rows=len(labels), count=count)


def _listed_operators(items: Mapping[str, Any]) -> Sequence[str] | None:
    """The symmetry operators that a block lists, none of which takes long to read; None where it lists none."""
    listed = next((items[key] for key in _OPERATOR_TAGS if items.get(key)), None)
    listed = [listed] if isinstance(listed, str) else listed
    longest = max(map(len, listed or ()), default=0)
    if longest > _LONGEST_OPERATOR:
        raise CIFError(f"a symmetry operator has {longest:,} characters: write it as 'x, y, z'")
    return listed


def _check_images(items: Mapping[str, Any], parser: CifParser, *, rows: int, count: int) -> None:
    if rows * count <= _FEW_IMAGES:
        return
    operators = parser.get_symops(CifBlock(dict(items), [], ""))
    images = rows * len(operators)
    if images > MAX_IMAGES:
        raise CIFError(
            f"{rows:,} sites under {len(operators):,} operators have {images:,} images, at most "
            f"{MAX_IMAGES:,} are taken: leave it out"
        )
    # The count is rough where images nearly coincide; the exact one is taken after the expansion.
    sites = count_sites(items, operators)
    if sites > 2 * MAX_ATOMS:
        raise CIFError(f"the cell has {sites:,} atoms, at most {MAX_ATOMS:,} are taken: leave it out")


def refuse_too_many(rows: int) -> None:
    """Refuse a text that lists too many atoms before the slow part.

    Raises:
        CIFError: over 2,000.
    """
    if rows > MAX_ATOMS:
        raise CIFError(f"the text lists {rows:,} atoms, at most {MAX_ATOMS:,} are taken: leave it out")


def count_sites(items: Mapping[str, Any], operators: Sequence[SymmOp]) -> int:
    """How many sites the rows of a block expand to, on a grid of 0.001; 0 if coordinates are unreadable."""
    columns = [items.get(f"_atom_site_fract_{axis}", ()) for axis in "xyz"]
    try:
        coordinates = np.array([[float(value.split("(")[0]) for value in column] for column in columns]).T
    except (AttributeError, ValueError):
        return 0  # ragged or no numbers: the expansion stops at them
    if coordinates.ndim != 2 or coordinates.shape[1] != 3 or not np.isfinite(coordinates).all():
        return 0
    rotations = np.array([operator.rotation_matrix for operator in operators])
    translations = np.array([operator.translation_vector for operator in operators])
    images = np.einsum("oij,rj->roi", rotations, coordinates) + translations
    # The offset keeps coordinates of four decimals, with thirds added, off the borders of the grid.
    cells = np.floor((images % 1.0) * 1000 + 0.37).astype(np.int64) % 1000
    keys = (cells[..., 0] * 1000 + cells[..., 1]) * 1000 + cells[..., 2]
    return sum(len(np.unique(row)) for row in keys)


def check_transformation(items: Mapping[str, Any]) -> None:
    """Refuse a magnetic block whose change of basis would keep sympy busy for ever.

    Raises:
        CIFError: there is a power in it.
    """
    if _POWER in str(items.get(_TRANSFORMATION, "")):
        raise CIFError(f"{_TRANSFORMATION} has a power in it: write it as 'a,b,c;0,0,0'")


def check_lattice(lattice: Lattice) -> None:
    """Refuse a cell without a volume, or of which a lattice vector is shorter than 0.1 Å.

    Raises:
        CIFError: it is such a cell.
    """
    cell = ", ".join(f"{value:g}" for value in lattice.parameters)
    if not (np.isfinite(lattice.matrix).all() and lattice.volume > 0):
        raise CIFError(f"the cell ({cell}) has no volume: check its lengths and angles")
    if np.min(1 / np.linalg.norm(lattice.inv_matrix, axis=0)) > THIN:
        return
    shortest = min(lattice.get_lll_reduced_lattice().abc)
    if shortest < _SHORTEST_VECTOR:
        raise CIFError(
            f"the cell ({cell}) repeats after {shortest:.2g} Å, closer than atoms are: check its lengths and angles"
        )
