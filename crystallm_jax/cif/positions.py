"""Wyckoff positions as equations of coordinates: where in the cell a site of a multiplicity can be."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby, product
from pathlib import Path
from reprlib import repr as shorten
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from crystallm_jax.cif.vocabulary import SPACEGROUPS, SPACEGROUPS_WITHOUT_TOKEN
from crystallm_jax.cif.wyckoff import parse_operations
from crystallm_jax.errors import CIFError

GRID = 24
"""Steps of a cell that all constants of positions are multiples of."""

TABLE_COLUMNS = ("group", "position", "multiplicity", "rows", "constants")
"""Of the table in `positions.npz`, a line for each flat: number of the group, place of the position, what it is."""

_VECTORS = np.array([v for v in product(range(-2, 3), repeat=3) if any(v)])


class Flat(NamedTuple):
    """A point, line or plane, or all of the cell: `rows @ (x, y, z) = constants`, up to whole cells.

    Attributes:
        rows: at most three, in echelon form: the first has the fewest axes from x on, each further one a later one.
        constants: of each row, in steps of 1 / GRID, 0 to GRID - 1.
    """

    rows: tuple[tuple[int, int, int], ...]
    constants: tuple[int, ...]


class Position(NamedTuple):
    """A Wyckoff position.

    Attributes:
        multiplicity: in the conventional cell.
        flats: of which each orbit has points on all.
    """

    multiplicity: int
    flats: tuple[Flat, ...]

    @property
    def is_fixed(self) -> bool:
        """Whether it has no free parameter, so that one orbit takes all of it."""
        return len(self.flats[0].rows) == 3


@cache
def _table() -> Mapping[str, tuple[Position, ...]]:
    numbers = {number: symbol for symbol, number in {**SPACEGROUPS, **SPACEGROUPS_WITHOUT_TOKEN}.items()}
    with np.load(Path(__file__).with_name("positions.npz"), allow_pickle=False) as table:
        entries = zip(*(table[name].tolist() for name in TABLE_COLUMNS), strict=True)
    groups: dict[str, list[Position]] = {}
    for (number, _, multiplicity), flats in groupby(entries, key=lambda entry: entry[:3]):
        flats_of = tuple(
            Flat(tuple(tuple(row) for row in rows if any(row)), tuple(constants[: sum(map(any, rows))]))
            for *_, rows, constants in flats
        )
        groups.setdefault(numbers[number], []).append(Position(multiplicity, flats_of))
    return MappingProxyType({symbol: tuple(positions) for symbol, positions in groups.items()})


def wyckoff_positions(symbol: str) -> tuple[Position, ...]:
    """The Wyckoff positions of a space group in the corpus's setting, by multiplicity.

    Raises:
        CIFError: the symbol is none of the 230 standard ones as the vocabulary writes them.
    """
    table = _table()
    if symbol not in table:
        raise CIFError(
            f"space group {shorten(symbol)} has no known positions: write one of the 230 standard symbols"
        )
    return table[symbol]


def derive_positions(operations: Sequence[str]) -> tuple[Position, ...]:
    """The Wyckoff positions of a group, from its operations such as `-x, y+1/2, -z`, centring ones among them.

    The points of a position are fixed by so many operations, up to whole cells, as its multiplicity takes to give the
    number of operations. Lines are the axes of proper rotations and planes those of mirrors, for the product of two
    mirrors is a rotation. Points are those of a grid, which has them all, whose operations leave no direction as it is.
    """
    rotations, translations = parse_operations(operations, GRID)
    flats = dict.fromkeys(_points(rotations, translations))
    for rotation, translation in zip(rotations, translations, strict=True):
        moved = rotation - np.eye(3, dtype=int)
        if 1 <= np.linalg.matrix_rank(moved) <= 2:
            flats |= dict.fromkeys(_solutions(moved, -translation))
    flats[Flat((), ())] = None
    positions = []
    while flats:
        first = next(iter(flats))
        orbit, fixing = _orbit(first, rotations, translations)
        for flat in orbit:
            flats.pop(flat, None)
        positions.append(Position(len(rotations) // fixing, orbit))
    return tuple(sorted(positions, key=lambda position: (position.multiplicity, position.flats)))


def _points(rotations: np.ndarray, translations: np.ndarray) -> Iterable[Flat]:
    """The points without a free direction."""
    points = np.indices((GRID,) * 3).reshape(3, -1)
    kept = np.stack(
        [
            ((rotation @ points + translation[:, None] - points) % GRID == 0).all(axis=0)
            for rotation, translation in zip(rotations, translations, strict=True)
        ]
    )
    patterns, which = np.unique(np.packbits(kept, axis=0), axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        group = rotations[np.unpackbits(pattern, count=len(rotations)).astype(bool)]
        # The sum over a group takes every vector to what all of it leaves as it is.
        if not group.sum(axis=0).any():
            for point in points[:, which.ravel() == number].T:
                yield _flat(np.eye(3, dtype=int), point)


def _solutions(moved: np.ndarray, wanted: np.ndarray) -> Iterable[Flat]:
    """The flats of `moved @ point = wanted`, up to whole cells."""
    rows = _echelon(_free_directions(moved))
    factors = np.rint(moved @ np.linalg.pinv(rows)).astype(int)
    constants = np.indices((GRID,) * len(rows)).reshape(len(rows), -1)
    solves = ((factors @ constants - wanted[:, None]) % GRID == 0).all(axis=0)
    return [_flat(rows, constant) for constant in constants[:, solves].T]


def _orbit(flat: Flat, rotations: np.ndarray, translations: np.ndarray) -> tuple[tuple[Flat, ...], int]:
    """All flats that the operations take a flat to, and how many of them leave each of its points where it is."""
    directions = _free_directions(np.array(flat.rows, int).reshape(-1, 3))
    point = _point(flat)
    orbit: dict[Flat, None] = {}
    fixing = 0
    for rotation, translation in zip(rotations, translations, strict=True):
        turned, moved = directions @ rotation.T, rotation @ point + translation
        rows = _echelon(turned)
        # The constants of a point in fractions of a step are whole all the same.
        orbit[_flat(rows, np.rint(rows @ moved).astype(int))] = None
        fixing += bool(
            (turned == directions).all() and not (np.abs((moved - point + 1e-6) % GRID) > 1e-5).any()
        )
    return tuple(sorted(orbit)), fixing


def _flat(rows: np.ndarray, constants: np.ndarray) -> Flat:
    return Flat(tuple(tuple(row) for row in rows.tolist()), tuple((constants % GRID).tolist()))


def _point(flat: Flat) -> np.ndarray:
    """One of its points, in steps of the grid."""
    if not flat.rows:
        return np.zeros(3)
    return np.linalg.lstsq(np.array(flat.rows, float), np.array(flat.constants, float), rcond=None)[0]


def _free_directions(rows: np.ndarray) -> np.ndarray:
    """Independent whole vectors [D, 3] along which `rows @ point` stays as it is."""
    inside = _VECTORS[~(_VECTORS @ rows.T).any(axis=1)] if len(rows) else np.eye(3, dtype=int)
    chosen: list[np.ndarray] = []
    for vector in inside[np.argsort(np.abs(inside).sum(axis=1), kind="stable")]:
        if np.linalg.matrix_rank(np.array([*chosen, vector])) > len(chosen):
            chosen.append(vector)
    return np.array(chosen, int).reshape(-1, 3)


def _echelon(directions: np.ndarray) -> np.ndarray:
    """The whole equations [R, 3] that hold along directions, in echelon form; the same for the same span."""
    return _echelon_of(tuple(map(tuple, directions.tolist())))


@lru_cache(maxsize=1024)
def _echelon_of(directions: tuple[tuple[int, ...], ...]) -> np.ndarray:
    normal = _VECTORS
    if directions:
        normal = normal[~(normal @ np.array(directions).T).any(axis=1)]
    rows = []
    for axis in range(3):
        ends = normal[(normal[:, axis] > 0) & ~normal[:, axis + 1 :].any(axis=1)]
        if len(ends):
            order = np.lexsort([*ends.T, np.abs(ends).sum(axis=1), ends[:, axis]])
            rows.append(ends[order[0]])
    return np.array(rows, int).reshape(-1, 3)
