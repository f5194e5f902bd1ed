"""Runs within the table of sites: from a site's last coordinate to the next one's multiplicity little is free.

The tokens of such a run have places: 0 the blank behind the coordinate, 1 to 3 the occupancy, 4 the line end, 5 the
next site's element (or the line end that ends the text), 6 a blank, 7 the element again, and from 8 on the digits of
its label and a blank.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.automaton import Automaton
from crystallm_jax.sampling.constrain.choices import current_level, digits_of
from crystallm_jax.sampling.constrain.nodes import DIGITS, NEWLINE, POINT, SPACE, Node, Slot
from crystallm_jax.sampling.constrain.state import AutomatonState

_NODES = (
    Node.GAP,
    Node.OCCUPANCY,
    Node.OCCUPANCY_POINT,
    Node.OCCUPANCY_ZERO,
    Node.ROW_END,
    Node.ELEMENT,
    Node.ELEMENT_GAP,
    Node.LABEL_ELEMENT,
    Node.WHOLE,
)
_NEXT_ROW, _CHOSEN, _LABEL = 5, 6, 8
_PLACE_OF_NODE = np.full(len(Node), -1, np.int32)
_PLACE_OF_NODE[list(_NODES)] = np.arange(len(_NODES))
_NODE_OF_PLACE = np.array(_NODES, np.int32)
_TOKENS = np.array([SPACE, DIGITS[1], POINT, DIGITS[0], NEWLINE, 0, SPACE, 0], np.int32)
_TENS = 10 ** np.arange(5, dtype=np.int32)


class RowRun(NamedTuple):
    """A run in the table of sites; all [B].

    Attributes:
        inside: bool; whether the row is in one.
        place, end: int32; places of the next token and of the one behind the run.
        done: bool; the text ends at place 5.
        element: int32; the next site's, as a place among the elements of the cell, where it is known.
        symbol: int32; its token.
        site: int32; its index.
    """

    inside: jax.Array
    place: jax.Array
    end: jax.Array
    done: jax.Array
    element: jax.Array
    symbol: jax.Array
    site: jax.Array


def row_run(automaton: Automaton, state: AutomatonState) -> RowRun:
    """The run of sites that each row is in."""
    node, slot = state.node, state.slot
    place = jnp.asarray(_PLACE_OF_NODE)[node]
    inside = (place >= 0) & ((node != Node.GAP) | (slot == Slot.Z))
    inside &= (node != Node.WHOLE) | (slot == Slot.LABEL)
    place += jnp.where(node == Node.WHOLE, state.digits, 0)
    site = state.site + (place < _NEXT_ROW)
    chosen = place >= _CHOSEN
    label_end = _LABEL + digits_of(site) + 1
    if automaton.level == "syntax":
        end = jnp.where(chosen, label_end, _NEXT_ROW)
        return RowRun(inside, place, end, jnp.zeros_like(inside), state.element, state.symbol, site)
    left = (state.remaining > 0) & (state.levels == current_level(state)[:, None])
    done = ~chosen & ~jnp.any(left, axis=1)
    only = jnp.sum(left, axis=1) == 1
    element = jnp.where(chosen, state.element, jnp.argmax(left, axis=1).astype(jnp.int32))
    symbol = jnp.take_along_axis(state.elements, element[:, None], axis=1)[:, 0]
    end = jnp.where(chosen | only, label_end, jnp.where(done, _CHOSEN, _NEXT_ROW))
    return RowRun(inside, place, end, done, element, jnp.where(chosen, state.symbol, symbol), site)


def row_tokens(run: RowRun, count: int) -> jax.Array:
    """Int32 [B, count]: the next tokens of the run; anything beyond its end."""
    place = run.place[:, None] + np.arange(count)
    symbol = jnp.where(run.done, NEWLINE, run.symbol)[:, None]
    fixed = jnp.asarray(_TOKENS)[jnp.minimum(place, _LABEL - 1)]
    fixed = jnp.where((place == _NEXT_ROW) | (place == _LABEL - 1), symbol, fixed)
    length = digits_of(run.site)[:, None]
    behind = length - 1 - (place - _LABEL)
    digit = run.site[:, None] // jnp.asarray(_TENS)[jnp.clip(behind, 0, 4)] % 10
    label = jnp.where(behind >= 0, jnp.asarray(np.array(DIGITS, np.int32))[digit], SPACE)
    return jnp.where(place < _LABEL, fixed, label)


def skip_in_row(state: AutomatonState, run: RowRun, count: jax.Array) -> tuple[AutomatonState, jax.Array]:
    """The registers after so many tokens of the run, and where these were all [B] and a multiplicity begins."""
    place = run.place + count
    digits = jnp.clip(place - _LABEL, 0, digits_of(run.site))
    in_label = place >= _LABEL
    chosen = (place >= _CHOSEN) & ~run.done
    node = jnp.asarray(_NODE_OF_PLACE)[jnp.minimum(place, _LABEL)]
    skipped = replace(
        state,
        node=jnp.where(run.done & (place >= _CHOSEN), Node.DONE, node),
        site=jnp.where(place >= _NEXT_ROW, run.site, state.site),
        element=jnp.where(chosen, run.element, state.element),
        symbol=jnp.where(chosen, run.symbol, state.symbol),
        slot=jnp.where(in_label, Slot.LABEL, state.slot),
        value=jnp.where(in_label, run.site // jnp.asarray(_TENS)[digits_of(run.site) - digits], state.value),
        digits=jnp.where(in_label, digits, state.digits),
        decimals=jnp.where(in_label, 0, state.decimals),
        low=jnp.where(in_label, run.site, state.low),
        high=jnp.where(in_label, run.site, state.high),
    )
    here = run.inside & (count > 0)
    return skipped.where(here, state), here & (place > _LABEL + digits_of(run.site))
