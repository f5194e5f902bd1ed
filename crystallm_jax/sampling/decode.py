"""Prefill and decode: two compiled functions over a batch of rows and its key-value cache.

A row's randomness is a function of its own key and of positions: neither the batch that it is decoded in nor the
order of batches changes a sample.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from crystallm_jax.model import GPT, KVCache, ModelConfig, grow_cache, init_cache
from crystallm_jax.sampling.methods import SamplingMethod, draw

_NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """A batch in the middle of decoding.

    Attributes:
        cache: keys and values of all tokens but each row's last.
        tokens: int32 [B, S + 1]; prompt and generated tokens, left-aligned, anything beyond `length`. One wider than
            the cache: the last token of a full context is drawn, but never read.
        length: int32 [B]; tokens of each row, the prompt's included.
        last: int32 [B]; each row's newest generated token, -1 where there is none.
        log_prob: float32 [B]; sum of the generated tokens' log-probabilities under the model itself (temperature 1,
            all tokens), in nats.
        finished: bool [B]; two newlines were generated.
        limit: int32 [B]; tokens at which a row stops unfinished.
        keys: typed keys [B]; the rows' randomness.
    """

    cache: KVCache
    tokens: jax.Array
    length: jax.Array
    last: jax.Array
    log_prob: jax.Array
    finished: jax.Array
    limit: jax.Array
    keys: jax.Array

    @property
    def active(self) -> jax.Array:
        """Bool [B]: rows that still generate."""
        return ~self.finished & (self.length < self.limit)


def bucket_size(tokens: int, block_size: int) -> int:
    """The cache size that holds so many tokens: a power of two of at least 64, at most the context.

    Sizes are few so that each is compiled once; reading stops at the bucket, not at the context.
    """
    size = 64
    while size < tokens:
        size *= 2
    return min(size, block_size)


@partial(jax.jit, static_argnames=("config", "method", "newline_id", "size"))
def prefill(
    config: ModelConfig,
    method: SamplingMethod,
    newline_id: int,
    size: int,
    *,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    keys: jax.Array,
) -> DecodeState:
    """Read the prompts and draw each row's first token. Compiled once a shape of `prompts` and `size`.

    Args:
        config: the model's shape.
        method: how tokens are drawn.
        newline_id: the token of which two in a row end a sample.
        size: S, of the cache and of the token buffer; at least the width of `prompts`.
        params: of the model.
        prompts: int32 [B, T], left-aligned; what follows a shorter prompt is not read.
        lengths: int32 [B], tokens of each prompt, at least 1.
        limit: int32 [B], as in DecodeState.
        keys: typed keys [B].
    """
    B, T = prompts.shape
    logits, cache = GPT(config).apply({"params": params}, prompts, cache=init_cache(config, B, size))
    state = DecodeState(
        # Padding was cached behind the shorter prompts: out of sight, and overwritten as the rows grow.
        cache=replace(cache, length=lengths),
        tokens=jnp.zeros((B, size + 1), jnp.int32).at[:, :T].set(prompts),
        length=lengths,
        last=jnp.full(B, _NO_TOKEN),
        log_prob=jnp.zeros(B),
        finished=jnp.zeros(B, bool),
        limit=limit,
        keys=keys,
    )
    last_logits = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return append_drawn(method, newline_id, state, last_logits)


@partial(jax.jit, static_argnames=("config", "method", "newline_id"), donate_argnames="state")
def decode(
    config: ModelConfig, method: SamplingMethod, newline_id: int, *, params: dict, state: DecodeState
) -> DecodeState:
    """Generate until every row is done or the longest fills the cache. Compiled once a cache size and batch.

    Nothing goes to the host in between; the state given is donated.
    """
    model = GPT(config)

    def going_on(state: DecodeState) -> jax.Array:
        fits = jnp.max(jnp.where(state.active, state.length, 0)) <= state.cache.size
        return jnp.any(state.active) & fits

    def step(state: DecodeState) -> DecodeState:
        # A row that is done repeats its newest token at the same place of the cache; nothing of it is kept.
        cache = replace(state.cache, length=state.length - 1)
        logits, cache = model.apply({"params": params}, state.last[:, None], cache=cache)
        return append_drawn(method, newline_id, replace(state, cache=cache), logits[:, 0])

    return jax.lax.while_loop(going_on, step, state)


def grow(state: DecodeState, size: int) -> DecodeState:
    """The same state with room for `size` tokens a row."""
    extra = [(0, 0), (0, size + 1 - state.tokens.shape[1])]
    return replace(state, cache=grow_cache(state.cache, size), tokens=jnp.pad(state.tokens, extra))


def append_drawn(
    method: SamplingMethod, newline_id: int, state: DecodeState, logits: jax.Array
) -> DecodeState:
    """Draw a token for each active row from logits [B, V] and append it."""
    with jax.named_scope("draw"):
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
        token = draw(method, logits, keys)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    active = state.active
    rows = jnp.arange(token.shape[0])
    place = jnp.where(active, state.length, state.tokens.shape[1])
    # A newline at the prompt's end does not count: `last` holds generated tokens only.
    ended = (token == newline_id) & (state.last == newline_id)
    return replace(
        state,
        tokens=state.tokens.at[rows, place].set(token, mode="drop"),
        length=jnp.where(active, state.length + 1, state.length),
        last=jnp.where(active, token, state.last),
        log_prob=jnp.where(active, state.log_prob + log_prob, state.log_prob),
        finished=state.finished | (active & ended),
    )
