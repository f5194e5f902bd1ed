"""What runs on the device: drawing tokens step by step.

A row's randomness is a function of its own key, of positions, and of how often it was taken back, so neither the batch
that it is decoded in nor the order of batches changes a sample.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from crystallm_jax.model.compiler import known_options
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Weights, read_columns
from crystallm_jax.model.pages import Log, Pages, PageTable, attend_pages
from crystallm_jax.sampling.constrain import Automaton, advance, allowed
from crystallm_jax.sampling.device_rows import RowState
from crystallm_jax.sampling.methods import SamplingMethod, draw

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
    """

    method: SamplingMethod
    newline_id: int
    automaton: Automaton | None = None


def append_drawn(rules: Rules, state: RowState) -> RowState:
    """Draw a token for each active row that is read up to its end, and append it; its logits are then out of date."""
    drawing, rows = state.active & ~state.unread, jnp.arange(state.length.shape[0])
    with jax.named_scope("draw"):
        logits, automaton = state.logits, state.automaton
        if rules.automaton is not None and automaton is not None:
            logits = jnp.where(allowed(rules.automaton, automaton), logits, -jnp.inf)
        token = draw(rules.method, logits, _keys(state))
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=-1)[:, 0]
    if rules.automaton is not None and automaton is not None:
        with jax.named_scope("automaton"):
            automaton = advance(rules.automaton, automaton, token, drawing)
    place = jnp.where(drawing, state.length, state.tokens.shape[1])
    # A newline at the prompt's end does not count.
    ended = (token == rules.newline_id) & (state.newest == rules.newline_id) & (state.length > state.begin)
    return replace(
        state,
        tokens=state.tokens.at[rows, place].set(token, mode="drop"),
        length=jnp.where(drawing, state.length + 1, state.length),
        log_probs=state.log_probs.at[rows, place].set(log_prob, mode="drop"),
        finished=state.finished | (drawing & ended),
        automaton=automaton,
    )


def _keys(state: RowState) -> jax.Array:
    """The keys of the tokens that come next: other ones than before for a row that was taken back."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
    again = jax.vmap(jax.random.fold_in)(keys, state.returns)
    return jnp.where(state.returns > 0, again, keys)


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
        reading = state.active
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
        position = jnp.clip(state.length - 1, 0, config.block_size - 1)
        logits = read_columns(config, weights, state.newest, position, attend=attend)
        state = replace(
            state,
            logits=jnp.where(reading[:, None], logits, state.logits),
            unread=state.unread & ~reading,
        )
        return step + 1, state, Log(tuple(keys), tuple(values))

    _, state, log = jax.lax.while_loop(going_on, step, (jnp.int32(0), state, log))
    return state, log
