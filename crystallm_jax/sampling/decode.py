"""What runs on the device: drawing tokens step by step, and reading many at once.

A row's randomness is a function of its own key and of positions, so neither the batch that it is decoded in nor the
order of batches changes a sample.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystallm_jax.model.columns import Before, attend_columns
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Weights, read_columns
from crystallm_jax.model.pages import Log, Pages, PageTable, attend_pages, column_pages
from crystallm_jax.sampling.constrain import (
    Automaton,
    AutomatonState,
    advance,
    allowed,
    run_length,
)
from crystallm_jax.sampling.methods import SamplingMethod, draw
from crystallm_jax.training.compiler import known_options

NO_TOKEN = -1
# A CPU's fused kernels compute what a product reads anew for each of its tiles: a step without them is 1.4 times as
# fast.
_ON_CPU: dict[str, bool | str] = {"xla_cpu_experimental_ynn_fusion_type": ""}


@dataclass(frozen=True)
class Rules:
    """How rows go on: a static argument, compiled in.

    Attributes:
        method: how tokens are drawn.
        newline_id: the token of which two in a row end a sample.
        automaton: what tokens may be drawn; None bars nothing.
        jump_from: a row with so many forced tokens ahead, or more, is held so that they can be read at once.
    """

    method: SamplingMethod
    newline_id: int
    automaton: Automaton | None = None
    jump_from: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """The rows of a batch in the middle of their texts.

    Attributes:
        tokens: int32 [B, T]; prompt and generated tokens, left-aligned, anything beyond `length`.
        length: int32 [B]; tokens of each row, the prompt's included.
        previous: int32 [B]; each row's newest generated token, -1 where there is none.
        logits: float32 [B, V]; of the token that comes next.
        log_prob: float32 [B]; sum of the generated tokens' log-probabilities under the model itself (temperature 1,
            all tokens), in nats.
        finished: bool [B]; two newlines were generated.
        held: bool [B]; the row waits for the host: for a plan, or for a run of forced tokens to be read.
        limit: int32 [B]; tokens at which a row stops unfinished; 0 where a place is empty.
        keys: typed keys [B]; the rows' randomness.
        automaton: where each row stands in its automaton; None without one.
    """

    tokens: jax.Array
    length: jax.Array
    previous: jax.Array
    logits: jax.Array
    log_prob: jax.Array
    finished: jax.Array
    held: jax.Array
    limit: jax.Array
    keys: jax.Array
    automaton: AutomatonState | None

    @property
    def active(self) -> jax.Array:
        """Bool [B]: rows that draw a token in the next step."""
        return ~self.finished & ~self.held & (self.length < self.limit)


def append_drawn(rules: Rules, state: RowState) -> RowState:
    """Draw a token for each active row from its logits and append it; the logits are then out of date."""
    active, rows = state.active, jnp.arange(state.length.shape[0])
    with jax.named_scope("draw"):
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
        logits, automaton = state.logits, state.automaton
        if rules.automaton is not None and automaton is not None:
            logits = jnp.where(allowed(rules.automaton, automaton), logits, -jnp.inf)
        token = draw(rules.method, logits, keys)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=-1)[:, 0]
    held = state.held
    if rules.automaton is not None and automaton is not None:
        with jax.named_scope("automaton"):
            automaton = advance(rules.automaton, automaton, token, active)
            held = held | (active & automaton.waiting)
            if rules.jump_from is not None:
                held = held | (active & (run_length(rules.automaton, automaton) >= rules.jump_from))
    place = jnp.where(active, state.length, state.tokens.shape[1])
    # A newline at the prompt's end does not count: `previous` holds generated tokens only.
    ended = (token == rules.newline_id) & (state.previous == rules.newline_id)
    return replace(
        state,
        tokens=state.tokens.at[rows, place].set(token, mode="drop"),
        length=jnp.where(active, state.length + 1, state.length),
        previous=jnp.where(active, token, state.previous),
        log_prob=jnp.where(active, state.log_prob + log_prob, state.log_prob),
        finished=state.finished | (active & ended),
        held=held,
        automaton=automaton,
    )


@cache
def decoder(platform: str) -> Any:
    """`decode_steps` compiled for a platform: `cpu`, `gpu`, `tpu`."""
    return jax.jit(
        decode_steps,
        static_argnames=("config", "rules"),
        donate_argnames=("state", "log"),
        compiler_options=known_options(_ON_CPU) if platform == "cpu" else None,
    )


def decode_steps(
    config: ModelConfig,
    rules: Rules,
    *,
    weights: Weights,
    blocks: tuple[Pages, ...],
    table: PageTable,
    state: RowState,
    log: Log,
) -> tuple[RowState, Log]:
    """Generate until the log is full or no row is active. Compiled once a batch size and number of blocks.

    Nothing goes to the host in between. `state` and `log` are donated.

    Args:
        config: the model's shape.
        rules: how rows go on.
        weights: as prepared.
        blocks: of the pool, only read.
        table: whose the pages are.
        state: of the rows.
        log: written from its beginning on; what is in it is not read.
    """

    def going_on(carry: tuple[jax.Array, RowState, Log]) -> jax.Array:
        step, state, _ = carry
        return (step < log.keys[0].shape[0]) & jnp.any(state.active)

    def step(carry: tuple[jax.Array, RowState, Log]) -> tuple[jax.Array, RowState, Log]:
        step, state, log = carry
        drawing = state.active
        state = append_drawn(rules, state)
        keys, values = list(log.keys), list(log.values)

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            for part, new in ((keys, k), (values, v)):
                entry = new.astype(part[layer].dtype)[None]
                part[layer] = jax.lax.dynamic_update_slice_in_dim(part[layer], entry, step, axis=0)
            return attend_pages(
                q,
                tuple(block.keys[layer] for block in blocks),
                tuple(block.values[layer] for block in blocks),
                keys[layer],
                values[layer],
                table=table,
                newest=step,
            )

        # A row that does not go on reads something all the same; nothing of it is kept.
        token = jnp.maximum(state.previous, 0)
        position = jnp.clip(state.length - 1, 0, config.block_size - 1)
        logits = read_columns(config, weights, token, position, attend=attend)
        state = replace(state, logits=jnp.where(drawing[:, None], logits, state.logits))
        return step + 1, state, Log(tuple(keys), tuple(values))

    _, state, log = jax.lax.while_loop(going_on, step, (jnp.int32(0), state, log))
    return state, log


class Columns(NamedTuple):
    """Tokens of several texts to read at once.

    Attributes:
        token: int32 [N].
        position: int32 [N].
        text: int32 [N]; which of the texts each is of; R for filling.
        target: int32 [N]; the token that follows, where its log-probability is asked for, else -1.
        page: int32 [P, S]; the columns of each page to make.
        last: int32 [R]; the last column of each text.
    """

    token: jax.Array
    position: jax.Array
    text: jax.Array
    target: jax.Array
    page: jax.Array
    last: jax.Array


class Reading(NamedTuple):
    """What was read.

    Attributes:
        pages: keys and values, as `Columns.page` has it.
        logits: float32 [R, V]; of the token that follows each text.
        log_prob: float32 [R]; of the targets of each text, summed, in nats.
    """

    pages: Pages
    logits: jax.Array
    log_prob: jax.Array


@partial(jax.jit, static_argnames=("config", "dtype"))
def read_texts(
    config: ModelConfig, dtype: str, *, weights: Weights, columns: Columns, before: Before | None
) -> Reading:
    """Read columns. Compiled once a shape.

    Args:
        config: the model's shape.
        dtype: of the pages.
        weights: as prepared.
        columns: what to read.
        before: what the texts had before; None where each begins here.
    """
    keys, values = [], []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_keys, of_values = column_pages(k.astype(dtype), v.astype(dtype), columns.page)
        keys.append(of_keys)
        values.append(of_values)
        return attend_columns(q, k, v, layer=layer, text=columns.text, before=before)

    logits = read_columns(config, weights, columns.token, columns.position, attend=attend)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), columns.target[:, None], axis=-1)[:, 0]
    whose = columns.text == jnp.arange(columns.last.shape[0])[:, None]
    summed = jnp.where(whose & (columns.target != NO_TOKEN), log_probs, 0.0).sum(1)
    return Reading(Pages(tuple(keys), tuple(values)), logits[columns.last], summed)
