"""The pieces of a text that are known before it is written, and the fields between them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.formula import cell_formula, formula_order, reduced_formula
from crystallm_jax.cif.preprocess import property_block
from crystallm_jax.cif.tokenizer import shared_tokenizer
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG, SPACEGROUPS
from crystallm_jax.sampling.constrain.nodes import KINDS, Kind

Level = Literal["syntax", "composition", "symmetry", "positions"]
WITH_GROUP: tuple[Level, ...] = ("symmetry", "positions")
"""The levels that hold a text to its space group, so that the group must be known before what follows is planned."""

REPEAT = "="
"""Stands in a piece for the first cell length as it was written."""
REPEAT_TOKEN = -1
_LINE_LENGTH = 70

_PROPERTIES = property_block([])
_LOOPS = """
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""
_CELL_TAGS = (
    "_cell_length_a",
    "_cell_length_b",
    "_cell_length_c",
    "_cell_angle_alpha",
    "_cell_angle_beta",
    "_cell_angle_gamma",
)
# What the model writes of a cell: a field, or the value that the lattice has in the corpus's setting.
_FREE = (Kind.EDGE, Kind.SECOND, Kind.THIRD, Kind.ALPHA, Kind.BETA, Kind.GAMMA)
_RIGHT = "90.0000"
_CELLS: tuple[tuple[int, tuple[Kind | str, ...]], ...] = (
    (195, (Kind.EDGE, REPEAT, REPEAT, _RIGHT, _RIGHT, _RIGHT)),
    (143, (Kind.EDGE, REPEAT, Kind.THIRD, _RIGHT, _RIGHT, "120.0000")),
    (75, (Kind.EDGE, REPEAT, Kind.THIRD, _RIGHT, _RIGHT, _RIGHT)),
    (16, (*_FREE[:3], _RIGHT, _RIGHT, _RIGHT)),
    (3, (*_FREE[:3], _RIGHT, Kind.BETA, _RIGHT)),
    (1, _FREE),
)


class Layout(NamedTuple):
    """A text to come: a piece, then a field, then a piece, and so on.

    Attributes:
        pieces: token ids, REPEAT_TOKEN for a repeated length; as many as kinds.
        kinds: the field after each piece.
    """

    pieces: tuple[tuple[int, ...], ...]
    kinds: tuple[Kind, ...]

    def least_tokens(self, first: int) -> int:
        """The fewest tokens of the pieces and fields from a piece on, but for sites."""
        edge = KINDS[Kind.EDGE].least_tokens
        pieces = sum(len(piece) + (edge - 1) * piece.count(REPEAT_TOKEN) for piece in self.pieces[first:])
        return pieces + sum(KINDS[kind].least_tokens for kind in self.kinds[first:])


def before_group(level: Level, counts: Mapping[str, int]) -> list[tuple[str, Kind]]:
    """From the end of the data line to the space group."""
    if level == "syntax":
        return [(f"{_stripped(_PROPERTIES)}\n", Kind.PROPERTIES), (f"{SPACEGROUP_TAG} ", Kind.GROUP)]
    return [(f"{_stripped(property_block(counts))}\n{SPACEGROUP_TAG} ", Kind.GROUP)]


def after_group(level: Level, counts: Mapping[str, int], symbol: str | None) -> list[tuple[str, Kind]]:
    """From the space group to the sites; the group is known from level `symmetry` on."""
    parts: list[tuple[str, Kind]] = []
    text = ""
    cell = _FREE if symbol is None else _cell(SPACEGROUPS[symbol])
    for tag, value in zip(_CELL_TAGS, cell, strict=True):
        text += f"\n{tag} "
        if isinstance(value, Kind):
            parts.append((text, value))
            text = ""
        else:
            text += value
    text += "\n_symmetry_Int_Tables_number "
    if symbol is None:
        parts.append((text, Kind.NUMBER))
        text = ""
    else:
        text += str(SPACEGROUPS[symbol])
    if level == "syntax":
        parts += [
            (f"{text}\n_chemical_formula_structural ", Kind.STRUCTURAL),
            ("\n_chemical_formula_sum ", Kind.SUM),
            ("\n_cell_volume ", Kind.VOLUME),
            ("\n_cell_formula_units_Z ", Kind.UNITS),
        ]
        return [*parts, (_LOOPS, Kind.SITES)]
    structural, units = reduced_formula(counts)
    total = cell_formula(counts, separator=" ")
    text += _line("_chemical_formula_structural", structural) + _line("_chemical_formula_sum", total)
    volume = Kind.CELL_VOLUME if level == "positions" else Kind.VOLUME
    parts.append((f"{text}\n_cell_volume ", volume))
    return [*parts, (f"\n_cell_formula_units_Z {int(units)}{_LOOPS}", Kind.SITES)]


def cell_values(symbol: str) -> tuple[float | None, ...]:
    """Lengths and angles that a space group fixes, in the order of the text: None for what is written or repeated."""
    values = _cell(SPACEGROUPS[symbol])
    return tuple(None if isinstance(value, Kind) or value == REPEAT else float(value) for value in values)


def lay_out(parts: Sequence[tuple[str, Kind]]) -> Layout:
    """The layout of texts and the fields that follow them."""
    return Layout(tuple(_tokens(text) for text, _ in parts), tuple(kind for _, kind in parts))


def site_levels(counts: Mapping[str, int]) -> list[list[str]]:
    """Elements in the order of sites; those of one electronegativity stand among each other."""
    ordered = formula_order(counts)
    levels = [ordered[:1]]
    for before, symbol in pairwise(ordered):
        value = ELEMENTS[symbol].electronegativity
        if value is None or value != ELEMENTS[before].electronegativity:
            levels.append([])
        levels[-1].append(symbol)
    return levels


def cell_start(number: int) -> int:
    """The first of the space groups whose cells have the same fields, by the number of one of them."""
    return next(first for first, _ in _CELLS if number >= first)


def _cell(number: int) -> tuple[Kind | str, ...]:
    return dict(_CELLS)[cell_start(number)]


def _line(tag: str, value: str) -> str:
    """A line of the text, in two where it is long."""
    quoted = f"'{value}'" if " " in value else value
    return f"\n{tag}{' ' if len(tag) + len(quoted) + 3 < _LINE_LENGTH else chr(10)}{quoted}"


def _stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _tokens(text: str) -> tuple[int, ...]:
    tokens: list[int] = []
    for n, part in enumerate(text.split(REPEAT)):
        tokens += [REPEAT_TOKEN] if n else []
        tokens += shared_tokenizer().encode_cif(part).tolist()
    return tuple(tokens)
