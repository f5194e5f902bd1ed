"""Which site multiplicities a space group has, and how many sites can have each: its Wyckoff positions."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from reprlib import repr as shorten
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from crystallm_jax.errors import CIFError

# All points without free parameters lie on this grid, and it meets all lines and planes of special points: one
# twice as fine gives the same table.
_GRID = 24
_TERM = re.compile(r"([+-]?)(?:([xyz])|(\d+)(?:/(\d+))?)")
_PROPER_TRACES = (-1, 0, 1, 2)


class SiteClass(NamedTuple):
    """Sites of one multiplicity in the conventional cell.

    Attributes:
        multiplicity: sites of an orbit.
        positions: how many such Wyckoff positions there are without a free parameter, each of which holds one
            orbit; None for those with free parameters, which hold any number.
    """

    multiplicity: int
    positions: int | None


@cache
def _table() -> Mapping[str, tuple[SiteClass, ...]]:
    table = json.loads(Path(__file__).with_name("wyckoff.json").read_text(encoding="utf-8"))
    return MappingProxyType(
        {
            symbol: tuple(
                [SiteClass(int(multiplicity), count) for multiplicity, count in fixed.items()]
                + [SiteClass(multiplicity, None) for multiplicity in free]
            )
            for symbol, (fixed, free) in table.items()
        }
    )


def site_classes(symbol: str) -> tuple[SiteClass, ...]:
    """The classes of sites of a space group: those without free parameters, then those with, each by multiplicity.

    Cells are conventional, those of rhombohedral groups hexagonal, as in the corpus.

    Raises:
        CIFError: the symbol is none of the 230 standard ones as the vocabulary writes them.
    """
    table = _table()
    if symbol not in table:
        raise CIFError(
            f"space group {shorten(symbol)} has no known sites: write one of the 230 standard symbols"
        )
    return table[symbol]


def derive_site_classes(operations: Sequence[str]) -> tuple[SiteClass, ...]:
    """The classes of sites of a group, from its operations such as `-x, y+1/2, -z`, centring ones among them.

    A point's site symmetry are the operations that leave it where it is, up to whole cells; its orbit has as
    many sites as the group has operations for one of these. A Wyckoff position without a free parameter is an orbit
    of points whose site symmetry leaves no direction as it is. Those with one are lines along the axes of the
    site symmetries and planes of their mirrors; the general position is the last.
    """
    rotations, translations = parse_operations(operations, _GRID)
    points = np.indices((_GRID,) * 3).reshape(3, -1)
    kept = np.empty((len(operations), points.shape[1]), dtype=bool)
    for row, rotation, translation in zip(kept, rotations, translations, strict=True):
        row[:] = ((rotation @ points + translation[:, None] - points) % _GRID == 0).all(axis=0)
    fixed: Counter[int] = Counter()
    free = {len(operations)}
    # Points with the same site symmetry are looked into once: 24³ points have at most some hundred of them.
    patterns, counts = np.unique(np.packbits(kept, axis=0), axis=1, return_counts=True)
    for pattern, count in zip(patterns.T, counts.tolist(), strict=True):
        group = rotations[np.unpackbits(pattern, count=len(operations)).astype(bool)]
        orders = [int((group @ axis == axis).all(axis=1).sum()) for axis in _axes(group)]
        free.update(len(operations) // order for order in orders)
        if any(_is_mirror(rotation) for rotation in group):
            free.add(len(operations) // 2)
        if not group.sum(axis=0).any():
            fixed[len(operations) // len(group)] += count
    return tuple(
        [SiteClass(multiplicity, fixed[multiplicity] // multiplicity) for multiplicity in sorted(fixed)]
        + [SiteClass(multiplicity, None) for multiplicity in sorted(free)]
    )


def parse_operations(operations: Sequence[str], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Operations such as `-x, y+1/2, -z`: rotations [N, 3, 3] and translations [N, 3] in steps of 1 / grid."""
    rotations = np.zeros((len(operations), 3, 3), dtype=np.int64)
    translations = np.zeros((len(operations), 3), dtype=np.int64)
    for n, operation in enumerate(operations):
        for i, part in enumerate(operation.replace(" ", "").split(",")):
            for sign, axis, above, below in _TERM.findall(part):
                factor = -1 if sign == "-" else 1
                if axis:
                    rotations[n, i, "xyz".index(axis)] += factor
                else:
                    steps = Fraction(int(above), int(below or 1)) * grid
                    translations[n, i] += factor * int(steps)
    return rotations, translations


def _axes(group: np.ndarray) -> Iterable[np.ndarray]:
    """A vector along the axis of each proper rotation of a point group [N, 3, 3] but the identity."""
    for rotation in group:
        # The determinant of an integer matrix of order 1 to 6 is 1 or -1.
        if np.linalg.det(rotation) > 0 and np.trace(rotation) in _PROPER_TRACES:
            # The sum of its powers, whose orders divide 12, takes every vector to the axis.
            projector = np.stack([np.linalg.matrix_power(rotation, n) for n in range(12)]).sum(axis=0)
            yield next(column for column in projector.T if column.any())


def _is_mirror(rotation: np.ndarray) -> bool:
    return bool(np.linalg.det(rotation) < 0 and np.trace(rotation) == 1)
