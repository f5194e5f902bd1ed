"""Causal attention: the only place that names a backend.

The letters are those of `crystallm_jax.model.transformer`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from crystallm_jax.model.config import AttentionBackend

Backend = Literal["xla", "blocked", "cudnn", "splash"]

# Query rows that the blocked form handles at a time; the fastest of 64, 128 and 256 on a CPU at 512 tokens.
BLOCK_ROWS = 128


def choose_backend(requested: AttentionBackend, *, dtype: str, dropout_rate: float) -> Backend:
    """The backend of full-context attention on the platform in use.

    cuDNN's fused kernel takes 16-bit inputs and has no dropout on attention probabilities, so `auto` takes it on
    NVIDIA for bfloat16 without attention dropout. On a CPU it takes the blocked form, elsewhere XLA's.
    """
    if requested != "auto":
        return requested
    platform = jax.default_backend()
    if platform == "cpu":
        return "blocked"
    return "cudnn" if platform == "gpu" and dtype == "bfloat16" and dropout_rate == 0 else "xla"


def causal_attention(
    q_BHTd: jax.Array,
    k_BHTd: jax.Array,
    v_BHTd: jax.Array,
    *,
    backend: Backend,
    segment_ids_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attention of each token to itself and those before it, [B, H, T, D / H]; softmax in float32.

    Args:
        q_BHTd: queries.
        k_BHTd: keys.
        v_BHTd: values.
        backend: as chosen by `choose_backend`.
        segment_ids_BT: tokens see those of their own segment alone; None makes a row one segment.
        dropout_rate: on attention probabilities; needs `dropout_key` when above 0.
        dropout_key: None switches dropout off.
    """
    if backend == "cudnn":
        q, k, v = (x.swapaxes(1, 2) for x in (q_BHTd, k_BHTd, v_BHTd))
        mask = None if segment_ids_BT is None else _same_segment(segment_ids_BT, segment_ids_BT)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, implementation="cudnn"
        ).swapaxes(1, 2)
    # The blocked form never computes most of the scores that the causal mask would throw away, and keeps none for
    # the backward pass: a block of queries sees the keys up to its own end.
    T = q_BHTd.shape[2]
    rows = BLOCK_ROWS if backend == "blocked" else T
    outputs = []
    for first in range(0, T, rows):
        last = min(first + rows, T)
        segments = None if segment_ids_BT is None else segment_ids_BT[:, :last]
        attend = _last_rows if rows >= T else jax.checkpoint(_last_rows, static_argnums=4)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, first)
        seen = (k_BHTd[:, :, :last], v_BHTd[:, :, :last], segments)
        outputs.append(attend(q_BHTd[:, :, first:last], *seen, dropout_rate, key))
    return jnp.concatenate(outputs, axis=2)


def cached_attention(
    q_BHTd: jax.Array, keys_BHSd: jax.Array, values_BHSd: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention of tokens at `positions_BT` to the cached positions up to their own, [B, H, T, D / H]."""
    S = keys_BHSd.shape[2]
    visible_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    return _softmax_attention(q_BHTd, keys_BHSd, values_BHSd, visible_BTS[:, None], 0.0, None)


def _last_rows(
    q_BHRd: jax.Array,
    k_BHSd: jax.Array,
    v_BHSd: jax.Array,
    segment_ids_BS: jax.Array | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Causal attention of the last R of S tokens. The mask is made here, so that the backward pass keeps none."""
    R, S = q_BHRd.shape[2], k_BHSd.shape[2]
    visible = (jnp.arange(S - R, S)[:, None] >= jnp.arange(S)[None, :])[None, None]
    if segment_ids_BS is not None:
        visible = visible & _same_segment(segment_ids_BS[:, S - R :], segment_ids_BS)
    return _softmax_attention(q_BHRd, k_BHSd, v_BHSd, visible, dropout_rate, dropout_key)


def _same_segment(queries_BR: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """Bool [B, 1, R, S]. Padding is a segment like others: a token always sees itself, so no row is empty (NaN)."""
    return queries_BR[:, None, :, None] == keys_BS[:, None, None, :]


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
    # Softmax by hand: dividing the d outputs instead of the S probabilities of a row reads the large array once less.
    peaks = jax.lax.stop_gradient(scores_BHTS.max(axis=-1, keepdims=True))
    weights_BHTS = jnp.exp(scores_BHTS - peaks)
    sums = weights_BHTS.sum(axis=-1, keepdims=True)
    if dropout_rate > 0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights_BHTS.shape)
        weights_BHTS = jnp.where(keep, weights_BHTS / (1 - dropout_rate), 0.0)
    mixed_BHTd = jnp.einsum(
        "BHTS,BHSd->BHTd",
        weights_BHTS.astype(v_BHSd.dtype),
        v_BHSd,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (mixed_BHTd / sums).astype(v_BHSd.dtype)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products for float32 operands: accelerators would otherwise round them to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
