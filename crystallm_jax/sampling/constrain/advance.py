"""What a drawn token does to the registers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.automaton import Automaton
from crystallm_jax.sampling.constrain.choices import counted_sites, current_level, digits_of, rows_cost
from crystallm_jax.sampling.constrain.costs import (
    COUNT_DIGIT_COST,
    ELEMENT_COST,
    END_COST,
    FIELD_MARGIN,
    MULTIPLICITY_COST,
    SITE_COST,
)
from crystallm_jax.sampling.constrain.nodes import (
    DECIMALS,
    DIGITS,
    KINDS,
    MAX_ANGLE,
    MAX_COORDINATE,
    MAX_MULTIPLICITY,
    MIN_ANGLE,
    MINUS,
    POINT,
    VOCABULARY,
    Kind,
    Node,
    Slot,
    tables,
)
from crystallm_jax.sampling.constrain.places import fixed_position
from crystallm_jax.sampling.constrain.script import script_end
from crystallm_jax.sampling.constrain.state import AutomatonState, Placed
from crystallm_jax.sampling.constrain.volumes import length_bounds, volume_bounds

_UNIT = 10**DECIMALS
# Angles closer than this (in degrees) to those of a flat cell are none.
_FLAT = 0.1
_NO_SLOT = -1
_DIGIT = np.full(VOCABULARY, -1, np.int32)
_DIGIT[list(DIGITS)] = np.arange(10)
_KIND_NODE, _KIND_LOW, _KIND_HIGH, _KIND_DECIMALS = (
    np.array([row[i] for row in KINDS.values()], np.int32) for i in range(4)
)
_COUNT_NODES = np.zeros(len(Node), bool)
_COUNT_NODES[[node for node in Node if node.name.endswith("_DIGITS")]] = True
_ATOM_NODES = np.zeros(len(Node), bool)
_ATOM_NODES[[Node.PROPERTY_GAP, *(node for node in Node if node.name.endswith("_ATOM"))]] = True
# What follows a number when it is complete: the next one at once, or a node.
_NEXT_SLOT = np.array([_NO_SLOT, Slot.MULTIPLICITY, Slot.X, *[_NO_SLOT] * 3, 7, 8, _NO_SLOT], np.int32)
_NEXT_NODE = np.array(
    [Node.SCRIPT, *[Node.WHOLE] * 2, *[Node.GAP] * 3, *[Node.WHOLE] * 2, Node.PROPERTY_ROW], np.int32
)
# What a gap behind a coordinate leads to.
_GAP_SLOT = np.array([*[_NO_SLOT] * 3, Slot.Y, Slot.Z, *[_NO_SLOT] * 4], np.int32)


def advance(
    automaton: Automaton, state: AutomatonState, token: jax.Array, active: jax.Array
) -> AutomatonState:
    """The registers after one allowed token a row, int32 [B]; those of rows that are not active as they were."""
    node = state.node
    target = jnp.take_along_axis(jnp.asarray(tables().target)[node], token[:, None], axis=1)[:, 0]
    digit = jnp.asarray(_DIGIT)[token]
    new = replace(state, room=state.room - 1)
    new, field_done, script_read, begin = _read(state, new, target, token=token, digit=digit)
    if automaton.holds("composition"):
        occupied = (node == Node.WHOLE) & (state.slot == Slot.MULTIPLICITY) & (digit < 0)
        new = _occupy(automaton, new).where(occupied, new)
    if automaton.holds("positions"):
        new = _place(
            state, new, z_done=(state.slot == Slot.Z) & (node == Node.FRACTION) & (new.node == Node.GAP)
        )
    new = replace(
        new,
        place=new.place + script_read,
        field=new.field + field_done,
        node=jnp.where(field_done | (node == Node.SCRIPT), Node.SCRIPT, new.node),
    )
    new = _read_formula(automaton, state, new, target=new.node, token=token, digit=digit)
    new = begin_number(automaton, new, begin)
    return enter_field(automaton, new).where(active, state)


def _read(
    state: AutomatonState, new: AutomatonState, target: jax.Array, *, token: jax.Array, digit: jax.Array
) -> tuple[AutomatonState, jax.Array, jax.Array, jax.Array]:
    """One token, but for what follows from it.

    Returns:
        The registers; bool [B], whether a field is done, and whether a token of the script was read; int32 [B], the
        slot whose number begins.
    """
    node, slot = state.node, state.slot
    whole, fraction = node == Node.WHOLE, node == Node.FRACTION
    is_digit = digit >= 0
    decimals = state.decimals + (fraction & is_digit)
    variable = slot >= Slot.ELECTRONEGATIVITY
    full = fraction & is_digit & (decimals == DECIMALS) & ~variable
    ended = (whole | fraction) & ~is_digit & (token != POINT) & (token != MINUS)
    done = full | ended
    in_field = slot == Slot.FIELD
    value = jnp.where((whole | fraction) & is_digit, state.value * 10 + digit, state.value)
    number_node = jnp.where(done, jnp.asarray(_NEXT_NODE)[slot], node)
    number_node = jnp.where(whole & (token == POINT), Node.FRACTION, number_node)
    field_end = (target == Node.FIELD_END) & ~(whole | fraction)
    begin = jnp.where(done, jnp.asarray(_NEXT_SLOT)[slot], _NO_SLOT)
    begin = jnp.where(node == Node.GAP, jnp.asarray(_GAP_SLOT)[slot], begin)
    begin = jnp.where(node == Node.LABEL_ELEMENT, Slot.LABEL, begin)
    begin = jnp.where(node == Node.PROPERTY_GAP, Slot.ELECTRONEGATIVITY, begin)
    after = jnp.where(whole | fraction, number_node, target)
    after = jnp.where((node == Node.GAP) & (slot == Slot.Z), Node.OCCUPANCY, after)
    kind = jnp.take_along_axis(state.kinds, state.field[:, None], axis=1)[:, 0]
    finished = done & in_field

    group_number = jnp.asarray(tables().group_number)[token]
    new = replace(
        new,
        node=after,
        value=value,
        digits=state.digits + (whole & is_digit),
        decimals=decimals,
        high=jnp.where(whole & (token == MINUS), 0, state.high),
        cell=jnp.where((finished[:, None]) & (kind[:, None] == np.arange(6)), value[:, None], state.cell),
        edge_digits=jnp.where(finished & (kind == Kind.EDGE), state.digits, state.edge_digits),
        group_number=jnp.where(node == Node.GROUP, group_number, state.group_number),
        site=state.site + (node == Node.ROW_END),
        sites=_remember(state, jnp.where(done, slot, _NO_SLOT), value),
    )
    field_done = finished | field_end | (node == Node.GROUP)
    # The token that ends a number without a point, or a formula, is the first of the script that follows.
    script_read = (node == Node.SCRIPT) | field_end | (finished & ended)
    return new, field_done, script_read, begin


def _remember(state: AutomatonState, slot: jax.Array, value: jax.Array) -> jax.Array:
    """The sites written, with the coordinate that is done now; `slot` [B] names it."""
    value %= MAX_COORDINATE
    pair = state.sites[:, -1, 0]
    pair = jnp.where(slot == Slot.X, value * MAX_COORDINATE, pair + jnp.where(slot == Slot.Y, value, 0))
    here = jnp.arange(state.sites.shape[1]) == state.site[:, None]
    written = jnp.stack([pair, value], axis=1)[:, None]
    sites = jnp.where((here & (slot == Slot.Z)[:, None])[:, :, None], written, state.sites)
    # The last place keeps the pair of the site that is being written.
    return sites.at[:, -1, 0].set(pair)


def _read_formula(
    automaton: Automaton,
    state: AutomatonState,
    new: AutomatonState,
    *,
    target: jax.Array,
    token: jax.Array,
    digit: jax.Array,
) -> AutomatonState:
    """The registers of elements and of counts in formulas."""
    is_element = (token < DIGITS[0]) & ((target == Node.ELEMENT_GAP) | (target == Node.DATA_ATOM))
    data = target == Node.DATA_ATOM
    in_formula = jnp.asarray(_ATOM_NODES)[target] & (token < DIGITS[0])
    counting = jnp.asarray(_COUNT_NODES)[target] & (digit >= 0)
    going_on = jnp.asarray(_COUNT_NODES)[state.node]
    table = tables()
    rank = jnp.asarray(table.rank)[token]
    sites = jnp.where(state.node == Node.DATA_DIGITS, counted_sites(automaton, state.value), 0)
    owed = state.owed + jnp.where(data, ELEMENT_COST + SITE_COST * sites, 0)
    owed += jnp.where(counting & (target == Node.DATA_DIGITS), COUNT_DIGIT_COST, 0)
    here = jnp.argmax(state.elements == token[:, None], axis=1).astype(jnp.int32)
    element = jnp.where(is_element & ~data, here, state.element)
    return replace(
        new,
        symbol=jnp.where(is_element, token, state.symbol),
        element=jnp.where(in_formula, state.element + 1, element),
        rank=jnp.where(data & (rank > 0), rank, state.rank),
        unranked=jnp.where(data, state.unranked | jnp.asarray(table.unranked)[token], state.unranked),
        owed=owed,
        value=jnp.where(counting, jnp.where(going_on, state.value * 10, 0) + digit, new.value),
        digits=jnp.where(counting, jnp.where(going_on, state.digits, 0) + 1, new.digits),
    )


def _occupy(automaton: Automaton, state: AutomatonState) -> AutomatonState:
    """The registers with a site of the multiplicity that has been written taken by its element."""
    mine = jnp.arange(state.remaining.shape[1]) == state.element[:, None]
    remaining = state.remaining - jnp.where(mine, state.value[:, None], 0)
    if not automaton.holds("symmetry"):
        return replace(state, remaining=remaining)
    chosen = state.multiplicities == state.value[:, None]
    steps = jnp.sum(jnp.where(chosen, state.steps, 0), axis=1)
    stride = jnp.sum(jnp.where(mine, state.strides, 0), axis=1)
    weight = jnp.sum(jnp.where(chosen & (state.most > 0), state.weights, 0), axis=1)
    after = replace(state, remaining=remaining, multiplicity=state.value)
    level = current_level(after)
    next_level = (level != current_level(state)) & jnp.any(remaining > 0, axis=1)
    # The table has the next level's full state before this one's empty one.
    return replace(after, index=state.index - steps * stride - next_level, taken=state.taken + weight)


def _place(state: AutomatonState, new: AutomatonState, *, z_done: jax.Array) -> AutomatonState:
    """What is kept of the site that is being written: how things stood before it, what it is, where it lies."""
    begins = (state.node == Node.ELEMENT) & (new.node == Node.ELEMENT_GAP)
    before = {
        Placed.ROOM: state.room,
        Placed.INDEX: state.index,
        Placed.TAKEN: state.taken,
        Placed.FIXED: state.fixed,
    }
    known = {Placed.ELEMENT: new.element, Placed.MULTIPLICITY: new.multiplicity}
    row = jnp.stack([{**before, **known}[column] for column in Placed], axis=1)
    columns = np.array([column in before for column in Placed])
    writes = jnp.where(columns, begins[:, None], z_done[:, None])
    here = np.arange(state.placed.shape[1]) == state.site[:, None]
    placed = jnp.where(here[:, :, None] & writes[:, None], row[:, None], state.placed)
    fixed = state.fixed | jnp.where(z_done, fixed_position(state, new.value), 0)
    return replace(new, placed=placed, fixed=fixed)


def begin_number(automaton: Automaton, state: AutomatonState, slot: jax.Array) -> AutomatonState:
    """The registers at the beginning of a number in a row, where `slot` [B] names one; -1 names none."""
    is_label, is_multiplicity = slot == Slot.LABEL, slot == Slot.MULTIPLICITY
    is_coordinate = (slot >= Slot.X) & (slot <= Slot.Z)
    least, most = _multiplicity_bounds(automaton, state)
    high = jnp.where(is_coordinate, MAX_COORDINATE, 100 * _UNIT - 1)
    begun = replace(
        state,
        node=jnp.full_like(state.node, Node.WHOLE),
        slot=slot,
        value=jnp.zeros_like(state.value),
        digits=jnp.zeros_like(state.digits),
        decimals=jnp.zeros_like(state.decimals),
        low=jnp.where(is_label, state.site, jnp.where(is_multiplicity, least, 0)),
        high=jnp.where(is_label, state.site, jnp.where(is_multiplicity, most, high)),
    )
    return begun.where(slot != _NO_SLOT, state)


def _multiplicity_bounds(automaton: Automaton, state: AutomatonState) -> tuple[jax.Array, jax.Array]:
    """Int32 [B]: the least and the greatest multiplicity that a site's row may state now."""
    if automaton.level == "syntax":
        spare = jnp.clip(state.room - MULTIPLICITY_COST - END_COST, 1, 3)
        return jnp.ones_like(spare), jnp.minimum(jnp.asarray((0, 9, 99, 999))[spare], MAX_MULTIPLICITY)
    left = jnp.take_along_axis(state.remaining, state.element[:, None], axis=1)[:, 0]
    # With less than all of them the element needs one more site.
    sites = jnp.sum(state.remaining > 0, axis=1)
    rest = rows_cost(state.site + 1, sites, most_digits=state.most_digits)
    several = digits_of(left) + MULTIPLICITY_COST + rest <= state.room
    return jnp.where(several, 1, left), left


def enter_field(automaton: Automaton, state: AutomatonState) -> AutomatonState:
    """The registers at the beginning of a field, in rows whose script has come to one."""
    here = (state.node == Node.SCRIPT) & (state.place == script_end(state))
    kind = jnp.take_along_axis(state.kinds, state.field[:, None], axis=1)[:, 0]
    low, high = jnp.asarray(_KIND_LOW)[kind], jnp.asarray(_KIND_HIGH)[kind]
    is_gamma = kind == Kind.GAMMA
    alpha, beta = state.cell[:, Kind.ALPHA], state.cell[:, Kind.BETA]
    flat = round(_FLAT * _UNIT)
    least = jnp.maximum(jnp.abs(alpha - beta) + flat, MIN_ANGLE * _UNIT)
    both = alpha + beta
    most = jnp.minimum(jnp.minimum(both, 360 * _UNIT - both) - flat, MAX_ANGLE * _UNIT)
    low, high = jnp.where(is_gamma, least, low), jnp.where(is_gamma, most, high)
    if automaton.level != "syntax":
        is_number = kind == Kind.NUMBER
        low = jnp.where(is_number, state.group_number, low)
        high = jnp.where(is_number, state.group_number, high)
    if automaton.holds("positions"):
        least, most = volume_bounds(state.cell)
        is_volume = kind == Kind.CELL_VOLUME
        low, high = jnp.where(is_volume, least, low), jnp.where(is_volume, most, high)
        shortest, longest = length_bounds(state, kind)
        # Where it leaves nothing, or little room, the cell is written as it comes, and drawn anew.
        reserve = jnp.take_along_axis(state.reserves, state.field[:, None], axis=1)[:, 0]
        bounded = (kind <= Kind.THIRD) & (shortest < longest) & (state.room >= reserve + FIELD_MARGIN)
        low, high = jnp.where(bounded, shortest, low), jnp.where(bounded, longest, high)
    zero = jnp.zeros_like(kind)
    entered = replace(
        state,
        node=jnp.asarray(_KIND_NODE)[kind],
        slot=zero,
        element=zero,
        value=zero,
        digits=zero,
        decimals=zero,
        low=low,
        high=high,
    )
    return entered.where(here, state)
