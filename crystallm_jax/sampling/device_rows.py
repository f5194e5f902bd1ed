"""The rows of a batch in the middle of their texts, on the device: begun, gone back with, copied, and looked at.

Rows come padded to a few sizes (`sampling.shapes`), so that each function is compiled for those alone; a place beyond
the batch is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain import Automaton, AutomatonState, Placed, advance, before_site, look

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """The rows of a batch. W, the width of a text, is one more than the context: what follows a full one can be drawn.

    Attributes:
        tokens: int32 [B, W]; prompt and generated tokens, left-aligned, anything beyond `length`.
        length: int32 [B]; tokens of each row, the prompt's included.
        begin: int32 [B]; tokens of the prompt.
        log_probs: float32 [B, W]; of each token but the first under the model itself (temperature 1, all tokens), in
            nats; anything beyond `length`.
        logits: float32 [B, V]; of the token that comes next, unless the row is `unread`.
        unread: bool [B]; the newest token is yet to be read, so nothing can be drawn yet.
        finished: bool [B]; two newlines were generated.
        limit: int32 [B]; tokens at which a row stops unfinished; 0 where a place is empty.
        keys: typed keys [B]; the rows' randomness.
        returns: int32 [B]; how often each row was taken back.
        automaton: where each row stands in its automaton; None without one.
    """

    tokens: jax.Array
    length: jax.Array
    begin: jax.Array
    log_probs: jax.Array
    logits: jax.Array
    unread: jax.Array
    finished: jax.Array
    limit: jax.Array
    keys: jax.Array
    returns: jax.Array
    automaton: AutomatonState | None

    @property
    def active(self) -> jax.Array:
        """Bool [B]: rows that go on in the next step; those that wait for the host to plan what follows do not."""
        going = ~self.finished & (self.length < self.limit)
        return going if self.automaton is None else going & ~self.automaton.waiting

    @property
    def newest(self) -> jax.Array:
        """Int32 [B]: each row's newest token."""
        last = jnp.maximum(self.length - 1, 0)[:, None]
        return jnp.take_along_axis(self.tokens, last, axis=1)[:, 0]


class NewRows(NamedTuple):
    """Rows to begin: of R texts all but the newest token were read.

    Attributes:
        tokens: int32 [R, W]; what stands so far.
        length: int32 [R].
        begin: int32 [R]; tokens of the prompt.
        limit: int32 [R].
        returns: int32 [R].
        key: uint32 [R, ...]; data of the rows' keys.
        automaton: where each stands; None without an automaton.
    """

    tokens: Array
    length: Array
    begin: Array
    limit: Array
    returns: Array
    key: Array
    automaton: AutomatonState | None


class Seen(NamedTuple):
    """What rows have become: tokens and log_probs [R, W], length int32 [R], finished bool [R]."""

    tokens: np.ndarray
    log_probs: np.ndarray
    length: np.ndarray
    finished: np.ndarray


def empty_rows(rows: int, width: int, vocab_size: int, *, automaton: AutomatonState | None) -> RowState:
    """A batch of empty places with room for `width` tokens each."""
    whole, nowhere = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    return RowState(
        tokens=jnp.zeros((rows, width), jnp.int32),
        length=whole,
        begin=jnp.zeros_like(whole),
        log_probs=jnp.zeros((rows, width)),
        logits=jnp.zeros((rows, vocab_size)),
        unread=nowhere,
        finished=jnp.zeros_like(nowhere),
        limit=jnp.zeros_like(whole),
        keys=jax.random.split(jax.random.key(0), rows),
        returns=jnp.zeros_like(whole),
        automaton=automaton,
    )


@partial(jax.jit, donate_argnames="state")
def begin_rows(
    state: RowState, places: Array, *, new: NewRows, log_probs: jax.Array, source: Array
) -> RowState:
    """The state with new rows in `places` [R]; their tokens' log-probabilities are rows [source] of those given."""
    put = _into(places)
    yes = jnp.ones(places.shape[0], bool)
    return RowState(
        tokens=put(state.tokens, new.tokens),
        length=put(state.length, new.length),
        begin=put(state.begin, new.begin),
        log_probs=put(state.log_probs, log_probs[source]),
        logits=state.logits,
        unread=put(state.unread, yes),
        finished=put(state.finished, ~yes),
        limit=put(state.limit, new.limit),
        keys=put(state.keys, _wrapped(new.key)),
        returns=put(state.returns, new.returns),
        automaton=jax.tree.map(put, state.automaton, new.automaton),
    )


@partial(jax.jit, donate_argnames="state")
def replan_rows(state: RowState, places: Array, automaton: AutomatonState) -> RowState:
    """The state with other registers for the rows in `places` [R]."""
    return replace(state, automaton=jax.tree.map(_into(places), state.automaton, automaton))


@partial(jax.jit, static_argnums=0, donate_argnames="state")
def take_rows_back(
    automaton: Automaton | None,
    state: RowState,
    places: Array,
    *,
    to: Array,
    planned: AutomatonState | None,
    since: Array,
) -> RowState:
    """The state with the rows in `places` [R] at an earlier length, `to` [R], from which they draw anew.

    Args:
        automaton: what the rows are held to.
        state: of the rows; donated.
        places: int32 [R].
        to: int32 [R].
        planned: registers after `since` tokens, from which those after `to` are found; None without an automaton.
        since: int32 [R].
    """
    put, (tokens, returns) = _into(places), _rows((state.tokens, state.returns), places)
    registers = None
    if automaton is not None and planned is not None:

        def step(t: jax.Array, registers: AutomatonState) -> AutomatonState:
            token = jnp.take_along_axis(tokens, (since + t)[:, None], axis=1, mode="clip")[:, 0]
            return advance(automaton, registers, token, jnp.asarray(since + t < to))

        registers = jax.lax.fori_loop(0, jnp.max(to - since), step, jax.tree.map(jnp.asarray, planned))
    yes = jnp.ones(places.shape[0], bool)
    return replace(
        state,
        length=put(state.length, to),
        unread=put(state.unread, yes),
        finished=put(state.finished, ~yes),
        returns=put(state.returns, returns + 1),
        automaton=jax.tree.map(put, state.automaton, registers),
    )


@partial(jax.jit, donate_argnames="state")
def return_to_sites(state: RowState, places: Array, site: Array) -> RowState:
    """The state with the rows in `places` [R] at the beginning of a site of theirs [R], which they draw anew."""
    if state.automaton is None:
        raise RuntimeError("rows that are held to nothing keep no sites")
    put, (returns, limit, registers) = (
        _into(places),
        _rows((state.returns, state.limit, state.automaton), places),
    )
    registers = before_site(registers, jnp.asarray(site))
    yes = jnp.ones(places.shape[0], bool)
    return replace(
        state,
        length=put(state.length, limit - registers.room),
        unread=put(state.unread, yes),
        finished=put(state.finished, ~yes),
        returns=put(state.returns, returns + 1),
        automaton=jax.tree.map(put, state.automaton, registers),
    )


@partial(jax.jit, donate_argnames="state")
def look_at_crystals(state: RowState) -> tuple[RowState, jax.Array, jax.Array]:
    """Look at what rows have written of their crystals since the last look.

    Returns:
        The state; int32 [B], the part that cannot stay, -1 for none; int32 [B, sites], tokens before each site.
    """
    if state.automaton is None:
        raise RuntimeError("rows that are held to nothing have no crystals to look at")
    registers, failed = look(state.automaton)
    begins = state.limit[:, None] - registers.placed[:, :, Placed.ROOM]
    return replace(state, automaton=registers), jnp.where(state.limit > 0, failed, -1), begins


@partial(jax.jit, donate_argnames="state")
def fork_rows(state: RowState, places: Array, *, source: Array, key: Array, limit: Array) -> RowState:
    """The state with the rows in `source` [R] in the places [R] too, with keys and limits of their own."""
    put = _into(places)
    copied = jax.tree.map(put, state, _rows(state, source))
    return replace(copied, limit=put(state.limit, limit), keys=put(state.keys, _wrapped(key)))


def look_at(state: RowState, places: np.ndarray) -> Seen:
    """Rows [R] of the state, on the host."""
    return Seen(*jax.device_get(_look((state.tokens, state.log_probs, state.length, state.finished), places)))


@jax.jit
def _look(leaves: tuple[jax.Array, ...], places: jax.Array) -> tuple[jax.Array, ...]:
    return _rows(leaves, places)


def _rows(tree: Any, places: Array) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0, mode="clip"), tree)


def _into(places: Array) -> Callable[[jax.Array, Array], jax.Array]:
    return lambda into, rows: into.at[places].set(rows, mode="drop")


def _wrapped(key: Array) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(key))
