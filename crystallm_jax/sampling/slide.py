"""Beyond the context, as the published generator goes on: by sliding its window, without a cache.

Every position in a slid window has another position embedding than before, so no cached key or value stays true:
each token costs a forward pass over the whole context.
"""

from functools import partial

import jax
import jax.numpy as jnp

from crystallm_jax.model import GPT, ModelConfig
from crystallm_jax.sampling.decode import DecodeState, append_drawn
from crystallm_jax.sampling.methods import SamplingMethod


@partial(jax.jit, static_argnames=("config", "method", "newline_id"))
def slide(
    config: ModelConfig, method: SamplingMethod, newline_id: int, *, params: dict, state: DecodeState
) -> DecodeState:
    """Generate until every row is done, each token from the last `block_size` alone. Compiled once a shape.

    All active rows have more than `block_size` tokens, and `state.tokens` has room for the greatest limit.
    """
    T = config.block_size

    def window(tokens: jax.Array, length: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(tokens, length - T, T)

    def step(state: DecodeState) -> DecodeState:
        logits, _ = GPT(config).apply({"params": params}, jax.vmap(window)(state.tokens, state.length))
        return append_drawn(method, newline_id, state, logits[:, -1])

    return jax.lax.while_loop(lambda state: jnp.any(state.active), step, state)
