"""The script of a row: pieces of text that are forced, and between them what the model writes by itself."""

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.nodes import DECIMALS, DIGITS, POINT, Kind
from crystallm_jax.sampling.constrain.state import SCRIPT_TOKENS, AutomatonState

_TENS = 10 ** np.arange(10, dtype=np.int32)


def script_token(state: AutomatonState) -> jax.Array:
    """Int32 [B]: the next token of the script; anything beyond its end."""
    place = state.place
    extra = state.edge_digits + DECIMALS  # tokens of a repeated length, but for one
    first, second = state.repeats[:, 0], state.repeats[:, 1] + extra
    in_first, in_second = place - first, place - second
    slot = place - jnp.where(in_first > 0, jnp.minimum(in_first, extra), 0)
    slot -= jnp.where(in_second > 0, jnp.minimum(in_second, extra), 0)
    slot = jnp.clip(slot, 0, SCRIPT_TOKENS - 1)[:, None]
    scripted = jnp.take_along_axis(state.script, slot, axis=1)[:, 0]
    into = jnp.where(in_second >= 0, in_second, in_first)
    repeated = (into >= 0) & (into <= extra)
    return jnp.where(repeated, _edge_token(state, into), scripted)


def script_end(state: AutomatonState) -> jax.Array:
    """Int32 [B]: the place at which the script leads into the next field."""
    end = jnp.take_along_axis(state.ends, state.field[:, None], axis=1)
    repeats = jnp.sum(state.repeats < end, axis=1)
    return end[:, 0] + repeats * (state.edge_digits + DECIMALS)


def _edge_token(state: AutomatonState, place: jax.Array) -> jax.Array:
    """The token at a place [B] of the first cell length as it is written."""
    whole = state.edge_digits
    behind = whole + DECIMALS - place - (place < whole)
    digit = state.cell[:, Kind.EDGE] // jnp.asarray(_TENS)[jnp.clip(behind, 0, 9)] % 10
    return jnp.where(place == whole, POINT, jnp.asarray(np.array(DIGITS, np.int32))[digit])
