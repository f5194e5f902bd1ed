"""How the next token is drawn from a row of logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from crystallm_jax.errors import SamplingError


@dataclass(frozen=True)
class SamplingMethod:
    """Top-k and nucleus sampling with a temperature.

    Attributes:
        temperature: logits are divided by it; above 0.
        top_k: only the k most likely tokens, and those that tie with the k-th, can be drawn (as published);
            None draws from all, 1 is greedy.
        top_p: of those, only the fewest most likely ones whose probabilities add up to it can be drawn, and those
            that tie with the last of them; None, or 1, draws from all.
        excluded: token ids that are never drawn.
    """

    temperature: float = 1.0
    top_k: int | None = 10
    top_p: float | None = None
    excluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise SamplingError(
                f"temperature={self.temperature}: must be above 0 and finite; for the most likely token use top_k=1"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p={self.top_p}: must be above 0 and at most 1")


def filtered_logits(method: SamplingMethod, logits: jax.Array) -> jax.Array:
    """Logits [..., V] over the temperature, minus infinity where a token cannot be drawn."""
    logits = logits / method.temperature
    if method.excluded:
        barred = jnp.zeros(logits.shape[-1], bool).at[jnp.array(method.excluded)].set(True)
        logits = jnp.where(barred, -jnp.inf, logits)
    if method.top_k is not None and method.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, method.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if method.top_p is not None and method.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(descending)
        # Kept as long as what is more likely does not add up to top_p yet: the first always is.
        kept = jnp.cumsum(shares, axis=-1) - shares < method.top_p
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(method: SamplingMethod, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token for each row of logits [B, V], int32 [B], row b by keys[b] alone.

    Greedy takes the first of the most likely tokens, so that ties do not hang on the key.
    """
    if method.top_k == 1:
        greedy = SamplingMethod(excluded=method.excluded, top_k=None)
        return jnp.argmax(filtered_logits(greedy, logits), axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered_logits(method, logits)).astype(jnp.int32)
