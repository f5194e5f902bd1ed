"""What is looked at once it is written, at level `positions`: the volume of the cell, and where each site's atoms lie.

The parts of a crystal are its cell and its sites, in the order of the text. Whether a part can stay hangs on its text
and that before it alone, not on when the look comes.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.cif.positions import GRID
from crystallm_jax.cif.spacegroups import spacegroup_operations
from crystallm_jax.cif.vocabulary import SPACEGROUPS
from crystallm_jax.cif.wyckoff import parse_operations
from crystallm_jax.sampling.constrain.atoms import LEAST_HEIGHT, atom_tables
from crystallm_jax.sampling.constrain.nodes import MAX_COORDINATE, Kind, Node
from crystallm_jax.sampling.constrain.places import CELL, UNIT
from crystallm_jax.sampling.constrain.state import AutomatonState, Placed
from crystallm_jax.sampling.constrain.volumes import cell_fits, flatness, full_cell, metric

# Pairs of sites and operations of a pair that are compared at once.
_PAIRS, _OPERATIONS = 128, 32
# Coordinates this near to a third or two thirds are read as these, and images this near to each other as one atom, by
# pymatgen: less than one in the last decimal.
_THIRDS = np.array([3333, 3334, 6666, 6667], np.int32)
_SAME = UNIT
# Images this near are one atom whose coordinates were rounded.
_ROUNDED = 2 * UNIT
# Numbers of the groups on hexagonal axes; in all others rotations exchange coordinates and turn their signs.
_HEXAGONAL = (143, 194)


class Operations(NamedTuple):
    """The operations of all space groups.

    Attributes:
        rotations: int32 [N, 3, 3].
        translations: int32 [N, 3], in steps of GRID.
        starts, counts: int32 [231], by the group's number.
    """

    rotations: np.ndarray
    translations: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


class Verdict(NamedTuple):
    """What is against a site: bool [B].

    Attributes:
        near: two atoms are nearer than the least distance of their elements.
        special: it lies on a position of a lower multiplicity than it states, or of a higher one.
        apart: images that are one atom differ by more than pymatgen takes for one, as coordinates were rounded.
    """

    near: jax.Array
    special: jax.Array
    apart: jax.Array


class _Near(NamedTuple):
    """What each row has found: whether atoms are too near, and images that are the site itself, to both accuracies."""

    near: jax.Array
    same: jax.Array
    rounded: jax.Array


@cache
def operations() -> Operations:
    """The operations of all groups, built once."""
    start, count = np.zeros((2, max(SPACEGROUPS.values()) + 1), np.int32)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for symbol, number in SPACEGROUPS.items():
        start[number] = sum(len(rotations) for rotations, _ in parts)
        parts.append(parse_operations(spacegroup_operations(symbol), GRID))
        count[number] = len(parts[-1][1])
    rotations, translations = (np.concatenate(arrays).astype(np.int32) for arrays in zip(*parts, strict=True))
    return Operations(rotations, translations, start, count)


def written_parts(state: AutomatonState) -> jax.Array:
    """Int32 [B]: how many parts of the crystal are whole."""
    kind = jnp.take_along_axis(state.kinds, state.field[:, None], axis=1)[:, 0]
    has_cell = ((kind == Kind.CELL_VOLUME) | (kind == Kind.SITES)) & (state.node != Node.WAITING)
    return jnp.where(has_cell, 1 + state.site, 0)


def look(state: AutomatonState) -> tuple[AutomatonState, jax.Array]:
    """Look at all parts that have come since the last look, up to the first that cannot stay.

    Returns:
        The registers with what passed; int32 [B], the part that cannot stay, -1 for none.
    """
    whole = written_parts(state)

    def due(carry: tuple[AutomatonState, jax.Array]) -> jax.Array:
        state, failed = carry
        return (state.passed < whole) & (failed < 0)

    def one(carry: tuple[AutomatonState, jax.Array]) -> tuple[AutomatonState, jax.Array]:
        state, failed = carry
        here = due(carry)
        site = jnp.where(here, state.passed - 1, -1)
        verdict = judge_site(state, site)
        stays = jnp.where(site < 0, cell_fits(state), ~(verdict.near | verdict.special | verdict.apart))
        failed = jnp.where(here & ~stays, state.passed, failed)
        return replace(state, passed=state.passed + (here & stays)), failed

    return jax.lax.while_loop(lambda carry: jnp.any(due(carry)), one, (state, jnp.full_like(whole, -1)))


def judge_site(state: AutomatonState, site: jax.Array) -> Verdict:
    """What is against a site [B] of each row beside those before it; nothing where it is below 0.

    The site is compared with all images of itself and of each site before it: pairs of sites, of all rows, one after
    the other in a list, so that a row with few costs little.
    """
    group = operations()
    count = jnp.asarray(group.counts)[state.group_number]
    chunks = -(-count // _OPERATIONS)
    work = jnp.where(site >= 0, (site + 1) * chunks, 0)
    ends = jnp.cumsum(work)
    lengths, angles = full_cell(state.cell)
    products = metric(lengths, angles)
    heights = lengths * (jnp.sqrt(flatness(angles))[:, None] / jnp.sin(angles))
    pairs = jnp.asarray(atom_tables().distances)[state.elements[:, :, None], state.elements[:, None]]
    there = state.elements >= 0
    most = jnp.max(jnp.where(there[:, :, None] & there[:, None], pairs, 0), axis=(1, 2))
    reach = most / jnp.maximum(jnp.min(heights, axis=1), LEAST_HEIGHT)
    # So many whole cells on each axis can bring an image within reach of an atom half a cell away at most.
    turns = jnp.max(jnp.where(site >= 0, jnp.floor(2 * reach), 0)).astype(jnp.int32) + 1

    def part(number: jax.Array, found: _Near) -> _Near:
        item = number * _PAIRS + np.arange(_PAIRS, dtype=np.int32)
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), len(ends) - 1).astype(jnp.int32)
        within = item - (ends - work)[row]
        pair = _Pair(row, site[row], within // chunks[row], within % chunks[row], item < ends[-1])
        near, same, rounded = _compare(state, pair, products[row], turns)
        return _Near(
            found.near.at[row].max(near), found.same.at[row].add(same), found.rounded.at[row].add(rounded)
        )

    none = jnp.zeros_like(count)
    found = jax.lax.fori_loop(0, -(-ends[-1] // _PAIRS), part, _Near(none > 0, none, none))
    placed = jnp.take_along_axis(state.placed, jnp.maximum(site, 0)[:, None, None], axis=1)[:, 0]
    wanted = count // jnp.maximum(placed[:, Placed.MULTIPLICITY], 1)
    here = site >= 0
    return Verdict(found.near & here, (found.rounded != wanted) & here, (found.same != found.rounded) & here)


class _Pair(NamedTuple):
    """Pairs to compare, [P] each: of a row, its site, an earlier one or itself, some of the group's operations."""

    row: jax.Array
    site: jax.Array
    other: jax.Array
    chunk: jax.Array
    real: jax.Array


def _compare(
    state: AutomatonState, pair: _Pair, products: jax.Array, turns: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bool [P], whether atoms are too near; int32 [P], images that are the site itself, to both accuracies."""
    group = operations()
    number = state.group_number[pair.row]
    first = jnp.asarray(group.starts)[number] + pair.chunk * _OPERATIONS
    places = first[:, None] + np.arange(_OPERATIONS)
    end = jnp.asarray(group.starts + group.counts)[number]
    real = pair.real[:, None] & (places < end[:, None])
    rotations = jnp.take(jnp.asarray(group.rotations), places, axis=0, mode="clip")
    translations = jnp.take(jnp.asarray(group.translations), places, axis=0, mode="clip")
    point, other = _point(state, pair.row, pair.site), _point(state, pair.row, pair.other)
    images = jnp.sum(rotations * other[:, None, None, :], axis=3) + translations * (CELL // GRID)
    apart = (point[:, None] - images + CELL // 2) % CELL - CELL // 2
    largest = jnp.max(jnp.abs(apart), axis=2)
    itself = (pair.site == pair.other)[:, None] & real
    # Of two images of one atom elsewhere in a hexagonal cell, x of one may differ as x - y does here.
    hexagonal = (number >= _HEXAGONAL[0]) & (number <= _HEXAGONAL[1])
    turned = jnp.where(hexagonal[:, None], jnp.abs(apart[..., 0] - apart[..., 1]), 0)
    same, rounded = itself & (jnp.maximum(largest, turned) < _SAME), itself & (largest <= _ROUNDED)
    least = _least_distance(state, pair)
    steps = apart.astype(jnp.float32) / CELL
    toward = jnp.where(steps > 0, -1.0, 1.0)

    def turn(code: jax.Array, near: jax.Array) -> jax.Array:
        digits = jnp.stack([code // turns**2, code // turns % turns, code % turns])
        # 0, 1, -1, 2, -2, …: the nearest image comes first, then that beyond the nearer side.
        cells = jnp.where(digits % 2 == 1, digits // 2 + 1, -(digits // 2)).astype(jnp.float32)
        moved = steps + toward * cells
        squared = jnp.sum(moved * jnp.sum(products[:, None] * moved[:, :, None, :], axis=3), axis=2)
        return near | ((squared < least[:, None] ** 2) & ~(rounded & (code == 0)))

    near = jax.lax.fori_loop(0, turns**3, turn, jnp.zeros_like(real))
    return jnp.any(near & real, axis=1), jnp.sum(same, axis=1), jnp.sum(rounded, axis=1)


def _point(state: AutomatonState, row: jax.Array, site: jax.Array) -> jax.Array:
    """Int32 [P, 3]: coordinates of a site, in parts of their last decimal."""
    pair, z = jnp.moveaxis(state.sites[row, site], 1, 0)
    written = jnp.stack([pair // MAX_COORDINATE, pair % MAX_COORDINATE, z], axis=1)
    third = jnp.any(written[:, :, None] == _THIRDS, axis=2)
    thirds = (written * 3 + MAX_COORDINATE // 2) // MAX_COORDINATE * (CELL // 3)
    return jnp.where(third, thirds, written * UNIT)


def _least_distance(state: AutomatonState, pair: _Pair) -> jax.Array:
    """Float32 [P]: the least distance of the elements of a pair's sites, in Å."""
    elements = [
        state.elements[pair.row, state.placed[pair.row, site, Placed.ELEMENT]]
        for site in (pair.site, pair.other)
    ]
    return jnp.asarray(atom_tables().distances)[elements[0], elements[1]]
