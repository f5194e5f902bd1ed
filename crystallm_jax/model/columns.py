"""Attention of many tokens at once, of several texts side by side: how prompts, and texts to score, are read.

N columns: tokens of several texts, each text in one piece and in order
"""

import math

import jax
import jax.numpy as jnp

from crystallm_jax.model.precision import matmul_precision


def attend_columns(q_HdN: jax.Array, k_HdN: jax.Array, v_HdN: jax.Array, *, text: jax.Array) -> jax.Array:
    """Each column's attention to those of its text up to itself: float32 [H, d, N]. Softmax and sums in float32.

    Args:
        q_HdN: queries.
        k_HdN: keys.
        v_HdN: values.
        text: int32 [N]; which text each column is of.
    """
    precision = matmul_precision(q_HdN.dtype)
    _, d, N = q_HdN.shape
    scores = jnp.einsum(
        "HdN,HdM->HNM", q_HdN, k_HdN, precision=precision, preferred_element_type=jnp.float32
    ) / math.sqrt(d)
    scores = jnp.where((text[:, None] == text) & jnp.tri(N, dtype=bool), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed_HdN = jnp.einsum(
        "HNM,HdM->HdN",
        weights.astype(v_HdN.dtype),
        v_HdN,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return mixed_HdN / weights.sum(-1)[:, None]
