"""Beyond the context, as the published generator goes on: by sliding its window, without a cache.

Every position in a slid window has another position embedding than before, so no cached key or value stays true:
each token costs a forward pass over the whole context.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.model import GPT, ModelConfig
from crystallm_jax.sampling.decode import Rules, append_drawn
from crystallm_jax.sampling.device_rows import RowState, empty_rows, look_at
from crystallm_jax.sampling.engine import Ended


def slide(
    config: ModelConfig, rules: Rules, rows: Sequence[Ended], *, params: dict, limits: Sequence[int]
) -> list[Ended]:
    """Go on with rows that filled the context until each ends or has as many tokens as its limit."""
    tokens = np.zeros((len(rows), max(limits)), np.int32)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row.tokens)] = row.tokens
    begin = [len(row.row.prompt) for row in rows]
    log_probs = np.zeros(tokens.shape, np.float32)
    log_probs[np.arange(len(rows)), begin] = [row.log_prob for row in rows]
    state = replace(
        empty_rows(len(rows), max(limits), config.vocab_size, automaton=None),
        tokens=jnp.asarray(tokens),
        length=jnp.array([len(row.tokens) for row in rows], jnp.int32),
        begin=jnp.array(begin, jnp.int32),
        log_probs=jnp.asarray(log_probs),
        limit=jnp.array(limits, jnp.int32),
        keys=jax.random.wrap_key_data(jnp.asarray(np.stack([row.row.key for row in rows]))),
    )
    state = _slide(config, rules, params=params, state=state)
    seen = look_at(state, np.arange(len(rows)))
    return [
        row._replace(
            tokens=seen.tokens[i, : seen.length[i]],
            log_prob=float(seen.log_probs[i, begin[i] : seen.length[i]].sum()),
            finished=bool(seen.finished[i]),
        )
        for i, row in enumerate(rows)
    ]


@partial(jax.jit, static_argnames=("config", "rules"))
def _slide(config: ModelConfig, rules: Rules, *, params: dict, state: RowState) -> RowState:
    """Generate until every row is done, each token from the last `block_size` alone. Compiled once a shape.

    All active rows have more than `block_size` tokens, and `state.tokens` has room for the greatest limit.
    """
    T = config.block_size

    def window(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(tokens, length - T, T)

    def step(state: RowState) -> RowState:
        logits = GPT(config).apply({"params": params}, jax.vmap(window)(state.tokens, state.length))
        return append_drawn(rules, replace(state, logits=logits[:, -1]))

    return jax.lax.while_loop(lambda state: jnp.any(state.active), step, state)
