"""How the next token is drawn from a row of logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from crystallm_jax.errors import SamplingError

# Up to so many are found by their maxima.
_FEW = 32


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
        logits = jnp.where(logits < _kth_largest(logits, method.top_k), -jnp.inf, logits)
    if method.top_p is not None and method.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(descending)
        # Kept as long as what is more likely does not add up to top_p yet: the first always is.
        kept = jnp.cumsum(shares, axis=-1) - shares < method.top_p
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _kth_largest(logits: jax.Array, k: int) -> jax.Array:
    """The k-th largest of each row of logits [..., V], equal ones counted each: [..., 1]."""

    def by_sorting(logits: jax.Array) -> jax.Array:
        return jax.lax.top_k(logits, k)[0][..., -1:]

    def by_maxima(logits: jax.Array) -> jax.Array:
        found = jnp.max(logits, axis=-1, keepdims=True)
        for _ in range(k - 1):
            enough = jnp.sum(logits >= found, axis=-1, keepdims=True) >= k
            below = jnp.max(jnp.where(logits < found, logits, -jnp.inf), axis=-1, keepdims=True)
            found = jnp.where(enough, found, below)
        return found

    # Sorting a few rows is slow on a CPU: it takes a tenth of a decoding step.
    if k > _FEW:
        return by_sorting(logits)
    return jax.lax.platform_dependent(logits, cpu=by_maxima, default=by_sorting)


def draw(method: SamplingMethod, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token for each row of logits [B, V], int32 [B], row b by keys[b] alone.

    Greedy takes the first of the most likely tokens, so that ties do not hang on the key.
    """
    if method.top_k == 1:
        greedy = SamplingMethod(excluded=method.excluded, top_k=None)
        return jnp.argmax(filtered_logits(greedy, logits), axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered_logits(method, logits)).astype(jnp.int32)
