"""The key-value cache: an explicit pytree that goes into and comes out of one `apply`.

Rows are left-aligned: row b holds positions 0 to length[b] - 1, and whatever lies beyond is masked. Every layer
has buffers of its own, so that a compiled loop updates each in place instead of copying a stacked one.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from crystallm_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: one array a layer, [B, H, S, D / H] in the model's dtype.
        values: likewise.
        length: int32 [B], positions filled in each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def size(self) -> int:
        """S, positions that fit in a row."""
        return self.keys[0].shape[2]


def init_cache(config: ModelConfig, batch_size: int, size: int) -> KVCache:
    """An empty cache of `size` positions for `batch_size` rows."""
    shape = (batch_size, config.n_head, size, config.head_dim)
    # Zeros, not empty: what lies beyond a row's length is multiplied by a zero probability and must be finite.
    layers = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.n_layer))
    return KVCache(keys=layers, values=layers, length=jnp.zeros(batch_size, jnp.int32))


def grow_cache(cache: KVCache, size: int) -> KVCache:
    """The same cache with room for `size` positions a row; `size` is at least the present one."""
    extra = [(0, 0), (0, 0), (0, size - cache.size), (0, 0)]
    return replace(
        cache,
        keys=tuple(jnp.pad(layer, extra) for layer in cache.keys),
        values=tuple(jnp.pad(layer, extra) for layer in cache.values),
    )


def append(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Write `new` [B, H, T, D / H] into `buffer` [B, H, S, D / H], row b from position start[b] on."""

    def write_row(row: jax.Array, tokens: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, tokens, position, axis=1)

    return jax.vmap(write_row)(buffer, new, start)
