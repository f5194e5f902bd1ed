"""Where in the cell the site that is being written can be: its Wyckoff positions as arithmetic on whole numbers.

A flat of a position becomes one or two forms, in which each coordinate is free, a constant, or follows from those
before it. A form is alive as long as the coordinates written so far lie on it.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.cif.positions import GRID, Flat, Position, wyckoff_positions
from crystallm_jax.cif.vocabulary import SPACEGROUPS
from crystallm_jax.sampling.constrain.nodes import (
    DECIMALS,
    MAX_COORDINATE,
    MAX_MULTIPLICITY,
    Node,
    Slot,
)
from crystallm_jax.sampling.constrain.state import AutomatonState

UNIT = 2 * GRID
"""Parts of the last decimal of a coordinate: halves of coordinates and all constants are whole numbers of them."""
CELL = MAX_COORDINATE * UNIT
_FREE, _CONSTANT, _RELATED = range(3)
# A related coordinate may differ by so much in its last decimal, as both are rounded.
_ROUNDING = 1
_TENS = 10 ** np.arange(DECIMALS + 1, dtype=np.int32)


class _Axis(NamedTuple):
    """A coordinate of a form: `offset + x * of_x + y * of_y`, in parts of its last decimal."""

    kind: int
    offset: int = 0
    of_x: int = 0
    of_y: int = 0


_Form = tuple[_Axis, _Axis, _Axis]


class Tables(NamedTuple):
    """All forms of all space groups.

    Attributes:
        forms: int32 [forms, 3, 4]; of each coordinate its `_Axis`.
        fixed: int32 [forms]; bit of the position in its group where it has no free parameter, else 0.
        starts, counts: int32 [231, MAX_MULTIPLICITY + 1]; where the forms of a group's multiplicity are.
        most: F, the most forms of a multiplicity.
    """

    forms: np.ndarray
    fixed: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    most: int


class _Found(NamedTuple):
    """The forms that the site being written may still lie on.

    Attributes:
        forms: int32 [B, F, 3, 4].
        fixed: int32 [B, F].
        alive: bool [B, F].
    """

    forms: jax.Array
    fixed: jax.Array
    alive: jax.Array


@cache
def tables() -> Tables:
    """All forms, built once."""
    forms: list[_Form] = []
    fixed: list[int] = []
    start, count = np.zeros((2, max(SPACEGROUPS.values()) + 1, MAX_MULTIPLICITY + 1), np.int32)
    for symbol, number in SPACEGROUPS.items():
        positions = wyckoff_positions(symbol)
        for multiplicity in sorted({position.multiplicity for position in positions}):
            start[number, multiplicity] = len(forms)
            for place, position in enumerate(positions):
                if position.multiplicity == multiplicity:
                    found = _forms(position)
                    forms += found
                    fixed += [(1 << place) * position.is_fixed] * len(found)
            count[number, multiplicity] = len(forms) - start[number, multiplicity]
    return Tables(np.array(forms, np.int32), np.array(fixed, np.int32), start, count, int(np.max(count)))


def _forms(position: Position) -> list[_Form]:
    return [form for flat in position.flats for form in _forms_of(flat)]


def _forms_of(flat: Flat) -> list[_Form]:
    axes = [[_Axis(_FREE)] for _ in range(3)]
    for row, constant in zip(flat.rows, flat.constants, strict=True):
        axis = max(i for i in range(3) if row[i])
        before = [-factor * UNIT // row[axis] for factor in (*row[:axis], 0, 0)]
        kind = _RELATED if any(row[:axis]) else _CONSTANT
        # Twice a coordinate says where it is up to half a cell.
        axes[axis] = [
            _Axis(kind, (constant * (CELL // GRID) + turn * CELL) // row[axis], *before[:2])
            for turn in range(row[axis])
        ]
    return [(x, y, z) for x in axes[0] for y in axes[1] for z in axes[2]]


def place_digits(state: AutomatonState) -> jax.Array:
    """Bool [B, 10]: digits of a coordinate that lead to a place of the stated multiplicity; all of them elsewhere."""
    axis = jnp.clip(state.slot - Slot.X, 0, 2)
    coordinates = _before(state)
    found = _alive(state, coordinates, known=axis)
    here = jnp.take_along_axis(found.forms, axis[:, None, None, None], axis=2)[:, :, 0]
    target, slack = _target(here, coordinates)
    offset = np.arange(-_ROUNDING, _ROUNDING + 1)
    value = ((target[:, :, None] + offset) % MAX_COORDINATE)[:, :, :, None]
    near = (found.alive[:, :, None] & (np.abs(offset) <= slack[:, :, None]))[:, :, :, None]
    whole = state.node == Node.WHOLE
    left = jnp.where(whole, DECIMALS, DECIMALS - 1 - state.decimals)
    step = jnp.asarray(_TENS)[jnp.clip(left, 0, DECIMALS)][:, None]
    first = (state.value[:, None] * 10 + np.arange(10)) * step
    # The one coordinate that begins with 1 is that of the cell's corner.
    last = jnp.where(whole[:, None] & (first == MAX_COORDINATE), first, first + step - 1)
    low, high = first[:, None, None], last[:, None, None]
    inside = ((low <= value) & (value <= high)) | (
        (low - MAX_COORDINATE <= value) & (value <= high - MAX_COORDINATE)
    )
    free = jnp.any(found.alive & (here[:, :, 0] == _FREE), axis=1)
    return free[:, None] | jnp.any(near & inside, axis=(1, 2)) | ~_placing(state)[:, None]


def fixed_position(state: AutomatonState, z: jax.Array) -> jax.Array:
    """Int32 [B]: the bit of the position without free parameters that the site lies on with a z; 0 for none."""
    coordinates = _before(state).at[:, 2].set(z)
    found = _alive(state, coordinates, known=jnp.full_like(z, 3))
    return jnp.max(jnp.where(found.alive, found.fixed, 0), axis=1)


def _placing(state: AutomatonState) -> jax.Array:
    return (
        (state.slot >= Slot.X)
        & (state.slot <= Slot.Z)
        & (state.node <= Node.FRACTION)
        & (state.node >= Node.WHOLE)
    )


def _before(state: AutomatonState) -> jax.Array:
    """Int32 [B, 3]: x and y of the site that is being written, as far as they are, and 0."""
    pair = state.sites[:, -1, 0]
    return jnp.stack([pair // MAX_COORDINATE, pair % MAX_COORDINATE, jnp.zeros_like(pair)], axis=1)


def _alive(state: AutomatonState, coordinates: jax.Array, *, known: jax.Array) -> _Found:
    """The forms that go with the first `known` [B] of the site's coordinates [B, 3], in units of the last decimal."""
    table = tables()
    start = jnp.asarray(table.starts)[state.group_number, state.multiplicity]
    count = jnp.asarray(table.counts)[state.group_number, state.multiplicity]
    places = start[:, None] + np.arange(table.most)
    forms = jnp.take(jnp.asarray(table.forms), places, axis=0, mode="clip")
    fixed = jnp.take(jnp.asarray(table.fixed), places, axis=0, mode="clip")
    alive = (jnp.arange(table.most) < count[:, None]) & ((fixed & state.fixed[:, None]) == 0)
    for axis in range(3):
        here = forms[:, :, axis]
        target, slack = _target(here, coordinates)
        apart = jnp.abs(coordinates[:, axis, None] % MAX_COORDINATE - target)
        near = jnp.minimum(apart, MAX_COORDINATE - apart) <= slack
        alive &= near | (here[:, :, 0] == _FREE) | (axis >= known)[:, None]
    return _Found(forms, fixed, alive)


def _target(axis: jax.Array, coordinates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What an axis [B, F, 4] makes of the coordinates before it, and how far from it is near enough: int32 [B, F]."""
    exact = axis[:, :, 1] + axis[:, :, 2] * coordinates[:, :1] + axis[:, :, 3] * coordinates[:, 1:2]
    return (exact + UNIT // 2) // UNIT % MAX_COORDINATE, jnp.where(axis[:, :, 0] == _RELATED, _ROUNDING, 0)
