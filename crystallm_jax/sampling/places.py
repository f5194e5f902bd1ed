"""The rows' places in a batch on the device: filled, gone on with, and looked at, some at a time.

Rows come padded to a few sizes (`padded_rows`), so that each function is compiled for those alone; a place beyond the
batch is left out.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain import AutomatonState, run_length, run_tokens, skip
from crystallm_jax.sampling.decode import NO_TOKEN, RowState, Rules

# Fewer rows cost no less than so many.
_FEWEST = 16


class NewRows(NamedTuple):
    """Rows to begin.

    Attributes:
        tokens: int32 [R, T]; what stands so far.
        length: int32 [R].
        previous: int32 [R]; the newest token that is none of the prompt's, -1 where there is none.
        limit: int32 [R].
        key: uint32 [R, ...]; data of the rows' keys.
        automaton: where each stands; None without an automaton.
    """

    tokens: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    previous: jax.Array | np.ndarray
    limit: jax.Array | np.ndarray
    key: jax.Array | np.ndarray
    automaton: AutomatonState | None


class Forced(NamedTuple):
    """Tokens that rows are given instead of drawing them.

    Attributes:
        tokens: int32 [R, K].
        counts: int32 [R]; how many of them.
        automaton: where each row stands behind them.
    """

    tokens: jax.Array | np.ndarray
    counts: jax.Array | np.ndarray
    automaton: AutomatonState | None


class Finished(NamedTuple):
    """What became of rows: tokens int32 [R, T], length int32 [R], log_prob float32 [R], finished bool [R]."""

    tokens: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    log_prob: jax.Array | np.ndarray
    finished: jax.Array | np.ndarray


def padded_count(count: int) -> int:
    """The size that so many are padded to: a power of two."""
    return 1 << max(count - 1, 0).bit_length()


def padded_rows(count: int) -> int:
    """The size that so many rows are padded to: few sizes, for each is another program."""
    return max(padded_count(count), _FEWEST)


def padded(values: np.ndarray, size: int, *, fill: int) -> np.ndarray:
    """Values [R, ...] with rows of `fill` after them."""
    rest = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, rest])


def empty_rows(batch_size: int, width: int, vocab_size: int, *, automaton: AutomatonState | None) -> RowState:
    """A batch of empty places with room for `width` tokens each."""
    whole = jnp.zeros(batch_size, jnp.int32)
    return RowState(
        tokens=jnp.zeros((batch_size, width), jnp.int32),
        length=whole,
        previous=jnp.full(batch_size, NO_TOKEN, jnp.int32),
        logits=jnp.zeros((batch_size, vocab_size)),
        log_prob=jnp.zeros(batch_size),
        finished=jnp.zeros(batch_size, bool),
        held=jnp.zeros(batch_size, bool),
        limit=jnp.zeros_like(whole),
        keys=jax.random.split(jax.random.key(0), batch_size),
        automaton=automaton,
    )


@partial(jax.jit, donate_argnames="state")
def fill_places(
    state: RowState,
    places: jax.Array,
    *,
    new: NewRows,
    logits: jax.Array,
    log_prob: jax.Array,
    source: jax.Array,
) -> RowState:
    """The state with new rows in `places` [R], their logits and log-probabilities taken from rows [source]."""

    def put(into: jax.Array, rows: jax.Array | np.ndarray) -> jax.Array:
        return into.at[places].set(rows, mode="drop")

    nothing = jnp.zeros(places.shape[0], bool)
    return RowState(
        tokens=put(state.tokens, new.tokens),
        length=put(state.length, new.length),
        previous=put(state.previous, new.previous),
        logits=put(state.logits, logits[source]),
        log_prob=put(state.log_prob, log_prob[source]),
        finished=put(state.finished, nothing),
        held=put(state.held, nothing),
        limit=put(state.limit, new.limit),
        keys=put(state.keys, jax.random.wrap_key_data(jnp.asarray(new.key))),
        automaton=jax.tree.map(put, state.automaton, new.automaton),
    )


@partial(jax.jit, static_argnums=0, static_argnames="width")
def look_ahead(rules: Rules, state: RowState, places: jax.Array, *, width: int) -> tuple[Forced, jax.Array]:
    """The forced tokens ahead of rows [R] in `places`, at most `width`; and which rows wait for a plan, bool [R]."""
    if rules.automaton is None or state.automaton is None:
        raise ValueError("without an automaton nothing is forced")
    here = jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0, mode="clip"), state.automaton)
    count = jnp.minimum(run_length(rules.automaton, here), width)
    forced = Forced(run_tokens(rules.automaton, here, width), count, skip(rules.automaton, here, count))
    return forced, here.waiting


@partial(jax.jit, static_argnums=0, donate_argnames="state")
def go_on(
    rules: Rules,
    state: RowState,
    places: jax.Array,
    *,
    forced: Forced,
    logits: jax.Array,
    log_prob: jax.Array,
    source: jax.Array,
) -> RowState:
    """The state with forced tokens appended to the rows in `places` [R], which are no longer held.

    Args:
        rules: how rows go on.
        state: of the rows; donated.
        places: int32 [R].
        forced: what is appended.
        logits: float32; row [source] is of the token after the forced ones.
        log_prob: float32; row [source] is the sum over the forced tokens but the first.
        source: int32 [R].
    """
    tokens, count, automaton = jnp.asarray(forced.tokens), jnp.asarray(forced.counts), forced.automaton
    K = tokens.shape[1]
    old = jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0, mode="clip"), state)
    some, steps = count > 0, jnp.arange(K)
    first = jnp.take_along_axis(jax.nn.log_softmax(old.logits), tokens[:, :1], axis=-1)[:, 0]
    last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    before_last = jnp.where(
        count > 1, jnp.take_along_axis(tokens, jnp.maximum(count - 2, 0)[:, None], axis=1)[:, 0], old.previous
    )
    ended = some & (last == rules.newline_id) & (before_last == rules.newline_id)
    held = jnp.zeros_like(some)
    if rules.automaton is not None and automaton is not None and rules.jump_from is not None:
        held = run_length(rules.automaton, automaton) >= rules.jump_from
    place = jnp.where(steps < count[:, None], old.length[:, None] + steps, state.tokens.shape[1])

    def put(into: jax.Array, rows: jax.Array | np.ndarray) -> jax.Array:
        return into.at[places].set(rows, mode="drop")

    return replace(
        state,
        tokens=state.tokens.at[places[:, None], place].set(tokens, mode="drop"),
        length=put(state.length, old.length + count),
        previous=put(state.previous, jnp.where(some, last, old.previous)),
        logits=put(state.logits, jnp.where(some[:, None], logits[source], old.logits)),
        log_prob=put(state.log_prob, old.log_prob + jnp.where(some, first + log_prob[source], 0.0)),
        finished=put(state.finished, ended),
        held=put(state.held, held),
        automaton=jax.tree.map(put, state.automaton, automaton),
    )


@jax.jit
def look_at(state: RowState, places: jax.Array) -> Finished:
    """Rows [R] of the state."""

    def of(leaf: jax.Array) -> jax.Array:
        return jnp.take(leaf, places, axis=0, mode="clip")

    return Finished(of(state.tokens), of(state.length), of(state.log_prob), of(state.finished))
