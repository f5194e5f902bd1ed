"""Causal attention: the only place that names a backend.

The letters are those of `crystallm_jax.model.transformer`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from crystallm_jax.model.config import AttentionBackend


def choose_backend(requested: AttentionBackend, *, dtype: str, dropout_rate: float) -> Literal["xla", "cudnn"]:
    """The backend of full-context attention on the platform in use.

    cuDNN's fused kernel takes 16-bit inputs and has no dropout on attention probabilities, so `auto` takes it on
    NVIDIA for bfloat16 without attention dropout, and XLA's everywhere else.
    """
    if requested != "auto":
        return requested
    fused = jax.default_backend() == "gpu" and dtype == "bfloat16" and dropout_rate == 0
    return "cudnn" if fused else "xla"


def causal_attention(
    q_BHTd: jax.Array,
    k_BHTd: jax.Array,
    v_BHTd: jax.Array,
    *,
    backend: Literal["xla", "cudnn"],
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attention of each token to itself and those before it, [B, H, T, D / H]; softmax in float32.

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        v_BHTd: values.
        backend: as chosen by `choose_backend`.
        dropout_rate: on attention probabilities; needs `dropout_key` when above 0.
        dropout_key: None switches dropout off.
    """
    if backend == "cudnn":
        heads_inside = [x.swapaxes(1, 2) for x in (q_BHTd, k_BHTd, v_BHTd)]
        return jax.nn.dot_product_attention(*heads_inside, is_causal=True, implementation="cudnn").swapaxes(1, 2)
    T = q_BHTd.shape[2]
    causal_TT = jnp.tril(jnp.ones((T, T), dtype=bool))
    return _softmax_attention(q_BHTd, k_BHTd, v_BHTd, causal_TT[None, None], dropout_rate, dropout_key)


def cached_attention(
    q_BHTd: jax.Array, keys_BHSd: jax.Array, values_BHSd: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention of tokens at `positions_BT` to the cached positions up to their own, [B, H, T, D / H]."""
    S = keys_BHSd.shape[2]
    visible_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    return _softmax_attention(q_BHTd, keys_BHSd, values_BHSd, visible_BTS[:, None], 0.0, None)


def _softmax_attention(
    q_BHTd: jax.Array,
    k_BHSd: jax.Array,
    v_BHSd: jax.Array,
    visible: jax.Array,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    precision = matmul_precision(q_BHTd.dtype)
    scores_BHTS = jnp.einsum(
        "BHTd,BHSd->BHTS", q_BHTd, k_BHSd, precision=precision, preferred_element_type=jnp.float32
    ) / math.sqrt(q_BHTd.shape[-1])
    scores_BHTS = jnp.where(visible, scores_BHTS, -jnp.inf)
    probabilities = jax.nn.softmax(scores_BHTS, axis=-1)
    if dropout_rate > 0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, probabilities.shape)
        probabilities = jnp.where(keep, probabilities / (1 - dropout_rate), 0.0)
    return jnp.einsum("BHTS,BHSd->BHTd", probabilities.astype(v_BHSd.dtype), v_BHSd, precision=precision)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products for float32 operands: accelerators would otherwise round them to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
