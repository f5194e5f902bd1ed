"""The volume of a cell from its lengths and angles, and what its atoms take."""

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.atoms import LEAST_HEIGHT, atom_tables
from crystallm_jax.sampling.constrain.nodes import DECIMALS, MAX_ANGLE, MAX_LENGTH, MAX_VOLUME, Kind
from crystallm_jax.sampling.constrain.state import SCRIPT_TOKENS, AutomatonState

_UNIT = 10.0**DECIMALS
# Numbers of single precision are right to so much of them.
_PRECISION = 2e-6


def full_cell(cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lengths in Å and angles in radians, float32 [B, 3] each, of cells as the registers have them [B, 6].

    A length that repeats the first one stands there as 0.
    """
    lengths = jnp.where(cell[:, :3] == 0, cell[:, :1], cell[:, :3]) / _UNIT
    return lengths, cell[:, 3:] * (np.pi / 180 / _UNIT)


def metric(lengths: jax.Array, angles: jax.Array) -> jax.Array:
    """Float32 [B, 3, 3]: products of cell vectors, in Å^2."""
    alpha, beta, gamma = jnp.moveaxis(jnp.cos(angles), 1, 0)
    one = jnp.ones_like(alpha)
    cosines = jnp.stack([one, gamma, beta, gamma, one, alpha, beta, alpha, one], axis=1).reshape(-1, 3, 3)
    return cosines * lengths[:, :, None] * lengths[:, None]


def flatness(angles: jax.Array) -> jax.Array:
    """Float32 [B]: the volume of a cell over the product of its lengths, squared; 0 for a flat one."""
    alpha, beta, gamma = jnp.moveaxis(jnp.cos(angles), 1, 0)
    return jnp.maximum(1 - alpha**2 - beta**2 - gamma**2 + 2 * alpha * beta * gamma, 0)


def volume_bounds(cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest volume that a cell can have whose lengths and angles were rounded to it.

    Args:
        cell: int32 [B, 6], as the registers have it.

    Returns:
        Int32 [B] each, in units of the last decimal; those of a field where the cell is too large for it.
    """
    lengths, angles = full_cell(cell)
    flat = jnp.maximum(flatness(angles), 1e-6)
    volume = jnp.prod(lengths, axis=1) * jnp.sqrt(flat) * _UNIT
    half = 0.5 / _UNIT
    # How the volume goes with an angle is bounded by its sine over what makes a cell flat, squared.
    turned = jnp.sum(jnp.abs(jnp.cos(angles)), axis=1) / flat * np.deg2rad(half)
    slack = volume * (jnp.sum(half / jnp.maximum(lengths, half), axis=1) + turned + _PRECISION) + 1
    least = jnp.clip(volume - slack, 1, MAX_VOLUME)
    most = jnp.clip(volume + slack, 1, MAX_VOLUME)
    return least.astype(jnp.int32), jnp.maximum(most, least).astype(jnp.int32)


def cell_fits(state: AutomatonState) -> jax.Array:
    """Bool [B]: whether the cell has room for its atoms, not much more, and is no flat one."""
    lengths, angles = full_cell(state.cell)
    flat = jnp.sqrt(flatness(angles))
    volume, (least, most) = jnp.prod(lengths, axis=1) * flat, _volumes(state)
    heights = lengths * (flat[:, None] / jnp.sin(angles))
    return (volume >= least) & (volume <= most) & (jnp.min(heights, axis=1) >= LEAST_HEIGHT)


def length_bounds(state: AutomatonState, kind: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest length of a kind [B] with which the cell can still fit its atoms.

    Returns:
        Int32 [B] each, in units of the last decimal; the first is greater than the second where there is none.
    """
    lengths, angles = full_cell(state.cell)
    least, most = _volumes(state)
    known = jnp.all(angles > 0, axis=1)
    flattest = jnp.where(known, jnp.sqrt(flatness(angles)), np.sin(np.deg2rad(MAX_ANGLE)))
    copies = jnp.sum(state.repeats < SCRIPT_TOKENS, axis=1)
    edge, second = lengths[:, 0], jnp.where(copies > 0, lengths[:, 0], lengths[:, 1])
    # What the lengths that are not written yet make of the volume at least.
    others = jnp.where(kind == Kind.EDGE, LEAST_HEIGHT ** (2.0 - copies), edge * LEAST_HEIGHT)
    others = jnp.where(kind == Kind.THIRD, edge * second, others)
    power = jnp.where(kind == Kind.EDGE, 1.0 / (1 + copies), 1.0)
    longest = (most / (flattest * others)) ** power
    shortest = jnp.where(
        (kind == Kind.THIRD) | (copies == 2),
        (least / (jnp.where(known, flattest, 1) * others)) ** power,
        LEAST_HEIGHT,
    )
    shortest = jnp.clip(jnp.maximum(shortest, LEAST_HEIGHT), 0, 2 * MAX_LENGTH)
    units = (shortest * _UNIT, jnp.minimum(longest, MAX_LENGTH) * _UNIT)
    return jnp.ceil(units[0]).astype(jnp.int32), jnp.floor(units[1]).astype(jnp.int32)


def _volumes(state: AutomatonState) -> tuple[jax.Array, jax.Array]:
    """Float32 [B]: the least and the greatest volume of a cell of these atoms, Å^3."""
    atoms = jnp.asarray(atom_tables().volumes)[state.elements]
    total = jnp.sum(jnp.where(state.elements >= 0, state.counts * atoms, 0), axis=1)
    least, most = atom_tables().shares
    return total * least, total * most
