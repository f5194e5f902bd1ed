"""Which tokens a row may draw: look-ups and elementwise work on [B, V] and less, nothing more."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.automaton import Automaton
from crystallm_jax.sampling.constrain.costs import (
    COUNT_DIGIT_COST,
    ELEMENT_COST,
    END_COST,
    FIELD_MARGIN,
    MAX_COUNT_DIGITS,
    MULTIPLICITY_COST,
    ROW_COST,
    SITE_COST,
    SITES_OF_REST,
    X_COST,
    Y_COST,
    Z_COST,
)
from crystallm_jax.sampling.constrain.nodes import (
    DECIMALS,
    DIGITS,
    KINDS,
    MAX_COORDINATE,
    MINUS,
    NEWLINE,
    POINT,
    SPACE,
    TOKEN_ID,
    VOCABULARY,
    WORD_BITS,
    Kind,
    Node,
    Slot,
    tables,
    token_set,
)
from crystallm_jax.sampling.constrain.places import place_digits
from crystallm_jax.sampling.constrain.script import script_token
from crystallm_jax.sampling.constrain.state import MAX_ELEMENTS, MOST_SITES, REMEMBERED_SITES, AutomatonState

_DIGIT_SETS = np.stack([token_set([digit]) for digit in DIGITS])
_DIGIT_SET = token_set(DIGITS)
_POINT_SET, _MINUS_SET, _SPACE_SET, _NEWLINE_SET = (
    token_set([token]) for token in (POINT, MINUS, SPACE, NEWLINE)
)
_ELEMENT_SET = token_set(range(TOKEN_ID["0"]))
_TENS = 10 ** np.arange(10, dtype=np.int32)
_MORE_DIGITS = 6
_KIND_DECIMALS = np.array([KINDS[kind].decimals for kind in Kind], np.int32)
_SLOT_DECIMALS = np.array([0, 0, 0, *[DECIMALS] * 6], np.int32)
_SLOT_ENDS = np.stack([token_set([NEWLINE if slot in (0, 8) else SPACE]) for slot in Slot])
_COORDINATE_COSTS = np.array([0, 0, 0, X_COST, Y_COST, Z_COST, 0, 0, 0], np.int32)
_COUNT_NODES = np.zeros(len(Node), bool)
_COUNT_NODES[[node for node in Node if node.name.endswith("_DIGITS")]] = True


class SiteChoices(NamedTuple):
    """What the next site can be, from level `symmetry` on.

    Attributes:
        possible: bool [B, E, K], whether an element can have a site of a multiplicity as far as the crystal goes.
        cost: int32 [B, E, K], tokens from that multiplicity to the end of the text, its digits included.
    """

    possible: jax.Array
    cost: jax.Array


def allowed(automaton: Automaton, state: AutomatonState) -> jax.Array:
    """Bool [B, V]: the tokens that may be drawn now; at least one in every row."""
    table = tables()
    node = state.node
    tight = state.room < _reserve(state) + FIELD_MARGIN
    static = jnp.asarray(table.allowed)[node]
    closing = jnp.asarray(table.closing)[node]
    fields = Node.DATA_FIRST if automaton.level == "syntax" else Node.PROPERTY_FIRST
    closes = tight | (state.element >= MAX_ELEMENTS)
    sets = jnp.where((closes & (node >= fields))[:, None], closing, static)
    full = jnp.asarray(_COUNT_NODES)[node] & (state.digits >= MAX_COUNT_DIGITS)
    sets = jnp.where(full[:, None], sets & ~_DIGIT_SET, sets)
    choices = site_choices(automaton, state) if automaton.holds("symmetry") else None
    forced = jnp.where(node == Node.LABEL_ELEMENT, state.symbol, script_token(state))
    is_forced = (node == Node.SCRIPT) | (node == Node.LABEL_ELEMENT)
    ways = (
        (is_forced, jnp.asarray(table.word)[forced]),
        (node == Node.GROUP, state.groups),
        ((node == Node.WHOLE) | (node == Node.FRACTION), _number_set(automaton, state, tight, choices)),
        (node == Node.ELEMENT, _element_set(automaton, state, choices)),
        ((node >= Node.DATA_FIRST) & (node <= Node.DATA_DIGITS), sets & _data_set(automaton, state)),
    )
    for here, chosen in ways:
        sets = jnp.where(here[:, None], chosen, sets)
    ids = np.arange(VOCABULARY)
    bits = sets[:, ids // WORD_BITS] >> (ids % WORD_BITS).astype(np.uint32)
    return (bits & 1).astype(bool)


def site_choices(automaton: Automaton, state: AutomatonState) -> SiteChoices:
    """What the next site can be in the stated space group."""
    values, most = state.multiplicities[:, None, :], state.most[:, None, :]
    index = state.index[:, None, None] - state.steps[:, None, :] * state.strides[:, :, None]
    weight = jnp.where(most > 0, state.weights[:, None, :], 0)
    taken = state.taken[:, None, None]
    here = (state.levels == current_level(state)[:, None])[:, :, None]
    possible = here & (values > 0) & (values <= state.remaining[:, :, None])
    possible &= (most == 0) | ((taken // state.weights[:, None, :]) % (most + 1) < most)
    place = index * state.positions[:, None, None] + taken + weight
    B, E, K = place.shape
    place = jnp.where(possible, place, 0).reshape(B, E * K)
    sites = jnp.take_along_axis(state.table, place, axis=1).reshape(B, E, K).astype(jnp.int32)
    possible &= sites < np.iinfo(np.uint8).max
    if automaton.holds("positions"):
        possible &= state.site[:, None, None] + 1 + sites <= MOST_SITES
    rest = rows_cost(state.site[:, None, None] + 1, sites, most_digits=state.most_digits[:, None, None])
    return SiteChoices(possible, digits_of(values) + MULTIPLICITY_COST + rest)


def current_level(state: AutomatonState) -> jax.Array:
    """Int32 [B]: the level of the first elements that have atoms left."""
    left = (state.remaining > 0) & (state.elements >= 0)
    return jnp.min(jnp.where(left, state.levels, np.iinfo(np.int32).max), axis=1)


def sites_left(automaton: Automaton, state: AutomatonState) -> jax.Array:
    """Int32 [B]: the fewest sites that finish the crystal."""
    if automaton.level == "syntax":
        return jnp.zeros_like(state.site)
    if automaton.level == "composition":
        return jnp.sum(state.remaining > 0, axis=1)
    place = state.index * state.positions + state.taken
    return jnp.take_along_axis(state.table, place[:, None], axis=1)[:, 0].astype(jnp.int32)


def rows_cost(first: jax.Array, sites: jax.Array, *, most_digits: jax.Array) -> jax.Array:
    """Tokens of so many rows from one site on, and of the end of the text."""
    after = first + sites
    labels = sites + sum(jnp.maximum(0, after - jnp.maximum(first, tens)) for tens in (10, 100))
    return sites * (ROW_COST + most_digits) + labels + END_COST


def digits_of(number: jax.Array) -> jax.Array:
    """Int32: decimal digits of numbers below 1,000."""
    return 1 + (number >= 10).astype(jnp.int32) + (number >= 100)


def _reserve(state: AutomatonState) -> jax.Array:
    return jnp.take_along_axis(state.reserves, state.field[:, None], axis=1)[:, 0]


def _digit_sets(can: jax.Array) -> jax.Array:
    """Uint32 [B, WORDS] of the digits that are True in bool [B, 10]."""
    return jnp.sum(jnp.where(can[:, :, None], _DIGIT_SETS, np.uint32(0)), axis=1, dtype=jnp.uint32)


def _only(here: jax.Array, members: np.ndarray | jax.Array) -> jax.Array:
    return jnp.where(here[:, None], members, np.uint32(0))


def _number_set(
    automaton: Automaton, state: AutomatonState, tight: jax.Array, choices: SiteChoices | None
) -> jax.Array:
    """Tokens that may continue the number that is being written."""
    slot, digits, value = state.slot, state.digits, state.value
    kind = jnp.take_along_axis(state.kinds, state.field[:, None], axis=1)[:, 0]
    in_field, variable = slot == Slot.FIELD, slot >= Slot.ELECTRONEGATIVITY
    decimals = jnp.where(in_field, jnp.asarray(_KIND_DECIMALS)[kind], jnp.asarray(_SLOT_DECIMALS)[slot])
    whole = state.node == Node.WHOLE
    following = value[:, None] * 10 + np.arange(10)
    # Before the point: some number of further digits must lead into the bounds, and fit.
    unit = jnp.asarray(_TENS)[decimals]
    low, high = state.low // unit, state.high // unit
    more = np.arange(_MORE_DIGITS)
    scale = _TENS[more]
    within = (low[:, None] // scale)[:, None] <= following[:, :, None]
    within &= following[:, :, None] <= (high[:, None] // scale)[:, None]
    within &= (more == 0) | (following[:, :, None] > 0)
    copies = jnp.where(kind == Kind.EDGE, jnp.sum(state.repeats < state.script.shape[1], axis=1), 0)
    need = 1 + more + (copies * digits)[:, None] + copies[:, None] * more
    need += (jnp.where(decimals > 0, 1 + decimals, 0) + _reserve(state))[:, None]
    within &= (~in_field[:, None] | (need <= state.room[:, None]))[:, None]
    can_whole = jnp.any(within, axis=2) & ~((digits > 0) & (value == 0))[:, None]
    can_whole &= ~(variable & tight & (digits > 0))[:, None]
    inside = (digits > 0) & (low <= value) & (value <= high)
    # Behind it: the digits that are left may be any.
    left = decimals - state.decimals - 1
    step = jnp.asarray(_TENS)[jnp.maximum(left, 0)][:, None]
    can_fraction = (state.low[:, None] // step <= following) & (following <= state.high[:, None] // step)
    can_fraction &= ((left >= 0) & ~(variable & tight & (state.decimals > 0)))[:, None]
    can = jnp.where(whole[:, None], can_whole, can_fraction)
    minus = whole & (slot >= Slot.X) & (slot <= Slot.Z) & (digits == 0) & (state.high > 0)
    if automaton.holds("positions"):
        can &= place_digits(state)
        # A minus leads where a 1 does, to the cell's corner.
        minus &= can[:, 1]
    taken = _taken_digits(state)
    can &= ~(taken & jnp.any(can & ~taken, axis=1, keepdims=True))
    ends = jnp.where(whole, inside & (decimals == 0), variable & (state.decimals > 0))
    if choices is not None:
        at_site, can_site, ends_site = _multiplicity_digits(state, choices)
        can = jnp.where(at_site[:, None], can_site, can)
        ends = jnp.where(at_site, ends_site, ends)
    rest = 1 + jnp.asarray(_COORDINATE_COSTS)[slot]
    rest += rows_cost(state.site + 1, sites_left(automaton, state), most_digits=state.most_digits)
    return (
        _digit_sets(can)
        | _only(whole & (decimals > 0) & inside, _POINT_SET)
        | _only(ends, jnp.asarray(_SLOT_ENDS)[slot])
        | _only(minus & ~taken[:, 1] & (rest <= state.room), _MINUS_SET)
    )


def _taken_digits(state: AutomatonState) -> jax.Array:
    """Bool [B, 10]: digits of a site's last coordinate that would put it on an earlier site."""
    same = state.sites[:, :, 0] == state.sites[:, -1:, 0]
    same &= (np.arange(REMEMBERED_SITES) < REMEMBERED_SITES - 1) & (state.sites[:, :, 1] >= 0)
    last = (state.value[:, None] * 10 + np.arange(10)) % MAX_COORDINATE
    on_last = jnp.any(same[:, :, None] & (state.sites[:, :, 1:] == last[:, None]), axis=1)
    # At its start a 1 or a minus leaves nothing but the cell's corner.
    corner = jnp.any(same & (state.sites[:, :, 1] == 0), axis=1)
    begins = (state.node == Node.WHOLE) & (state.digits == 0)
    ends = (state.node == Node.FRACTION) & (state.decimals == DECIMALS - 1)
    taken = jnp.where(begins[:, None], corner[:, None] & (np.arange(10) == 1), on_last & ends[:, None])
    return taken & (state.slot == Slot.Z)[:, None]


def _multiplicity_digits(
    state: AutomatonState, choices: SiteChoices
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a multiplicity is written [B], the digits that lead to a possible one [B, 10], and where it is one [B]."""
    slot = state.element[:, None, None]
    possible = choices.possible & (choices.cost <= (state.room + state.digits)[:, None, None])
    possible = jnp.take_along_axis(possible, slot, axis=1)[:, 0]
    length, digits = digits_of(state.multiplicities), state.digits[:, None]
    left = jnp.maximum(length - digits, 0)
    tens = jnp.asarray(_TENS)
    begins = possible & (length > digits) & (state.multiplicities // tens[left] == state.value[:, None])
    following = state.multiplicities // tens[jnp.maximum(left - 1, 0)] % 10
    can = jnp.any(begins[:, :, None] & (following[:, :, None] == np.arange(10)), axis=1)
    ends = jnp.any(possible & (state.multiplicities == state.value[:, None]), axis=1)
    return state.slot == Slot.MULTIPLICITY, can, ends


def _element_set(automaton: Automaton, state: AutomatonState, choices: SiteChoices | None) -> jax.Array:
    """Elements that the next site may have, or the end of the text."""
    start = 4 + digits_of(state.site)
    if automaton.level == "syntax":
        row = start + 1 + MULTIPLICITY_COST + END_COST
        return _only(row <= state.room, _ELEMENT_SET) | _only(state.site > 0, _NEWLINE_SET)
    if choices is None:
        here = (state.remaining > 0) & (state.levels == current_level(state)[:, None])
    else:
        fits = choices.cost <= (state.room - start)[:, None, None]
        here = jnp.any(choices.possible & fits, axis=2)
    symbols = jnp.asarray(tables().word)[jnp.maximum(state.elements, 0)]
    elements = jnp.sum(jnp.where(here[:, :, None], symbols, np.uint32(0)), axis=1, dtype=jnp.uint32)
    done = ~jnp.any(state.remaining > 0, axis=1)
    return elements | _only(done, _NEWLINE_SET)


def counted_sites(automaton: Automaton, count: jax.Array) -> jax.Array:
    """Int32: sites that so many atoms of an element need at most, whatever the other elements are."""
    if not automaton.holds("symmetry"):
        return jnp.ones_like(count)
    period = len(SITES_OF_REST)
    return count // period + jnp.asarray(SITES_OF_REST)[count % period]


def _data_set(automaton: Automaton, state: AutomatonState) -> jax.Array:
    """Tokens that may continue the formula of the data line, as far as order and room go."""
    table = tables()
    sets = jnp.asarray(table.after_rank)[state.rank] & jnp.asarray(table.without)[state.unranked]
    if automaton.level == "syntax":
        return sets
    room = (state.room - _reserve(state) - state.owed - 1)[:, None]
    following = jnp.where(state.node == Node.DATA_DIGITS, state.value, 0)[:, None] * 10 + np.arange(10)
    can = COUNT_DIGIT_COST + SITE_COST * counted_sites(automaton, following) <= room
    can |= (state.node == Node.DATA_ATOM)[:, None] & (np.arange(10) == 1)
    another = SITE_COST * (1 + counted_sites(automaton, state.value)) + ELEMENT_COST + COUNT_DIGIT_COST + 1
    grown = (another <= room[:, 0]) & (state.element < MAX_ELEMENTS)
    grown |= state.node == Node.DATA_FIRST
    free = sets & ~(_ELEMENT_SET | _DIGIT_SET)
    return free | _digit_sets(can) | jnp.where(grown[:, None], sets & _ELEMENT_SET, np.uint32(0))
