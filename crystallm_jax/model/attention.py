"""Causal attention: the only place that names a backend.

The letters are those of `crystallm_jax.model.transformer`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from crystallm_jax.errors import ConfigError
from crystallm_jax.model.blocked import ATTENTION_RESIDUALS, blocked_attention
from crystallm_jax.model.config import AttentionBackend
from crystallm_jax.model.precision import matmul_precision

Backend = Literal["xla", "blocked", "cudnn", "splash"]

# The splash kernel works on multiples of the 128 lanes of a TPU's vector unit.
LANES = 128


def choose_backend(
    requested: AttentionBackend, *, dtype: str, dropout_rate: float, tokens: int, platform: str | None = None
) -> Backend:
    """The backend of full-context attention.

    The fused kernels have no dropout on attention probabilities: cuDNN's takes 16-bit inputs, splash on TPU rows of a
    multiple of 128 tokens. `auto` takes them where they can be taken. Elsewhere, and on a CPU, it takes the blocked
    form, which keeps no scores for the backward pass: those of the large model would fill a device's memory.

    Args:
        requested: as configured.
        dtype: of the arithmetic.
        dropout_rate: on attention probabilities.
        tokens: T.
        platform: `cpu`, `gpu` or `tpu`; that of the default device unless given (to compile for another).

    Raises:
        ConfigError: a fused kernel is asked for that does not do what is asked of it.
    """
    fused = dropout_rate == 0 and (dtype == "bfloat16" or requested != "cudnn")
    if requested in ("cudnn", "splash") and not fused:
        raise ConfigError(
            f"attention={requested} with dtype={dtype} and attention dropout {dropout_rate}: it takes none, and cudnn"
            " bfloat16 alone; set attention_dropout=0, dtype=bfloat16 or attention=auto"
        )
    if requested == "splash" and tokens % LANES:
        raise ConfigError(
            f"attention=splash takes multiples of {LANES} tokens, not {tokens}; set attention=auto"
        )
    if requested != "auto":
        return requested
    platform = platform or jax.default_backend()
    if platform == "gpu" and dtype == "bfloat16" and dropout_rate == 0:
        return "cudnn"
    if platform == "tpu" and dropout_rate == 0 and tokens % LANES == 0:
        return "splash"
    return "blocked"


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
    if backend == "splash":
        # Here, not above: what it needs takes as long to import as JAX, and only TPUs have use for it.
        from crystallm_jax.model.splash import splash_causal_attention  # noqa: PLC0415

        return splash_causal_attention(
            q_BHTd, k_BHTd, v_BHTd, segment_ids_BT, residual_name=ATTENTION_RESIDUALS
        )
    key = dropout_key if dropout_rate > 0 else None
    if backend == "blocked":
        return blocked_attention(q_BHTd, k_BHTd, v_BHTd, segment_ids_BT, key, dropout_rate)
    T = q_BHTd.shape[2]
    visible = jnp.tri(T, dtype=bool)[None, None]
    if segment_ids_BT is not None:
        visible = visible & _same_segment(segment_ids_BT, segment_ids_BT)
    return _softmax_attention(q_BHTd, k_BHTd, v_BHTd, visible, dropout_rate, key)


def cached_attention(
    q_BHTd: jax.Array, keys_BHSd: jax.Array, values_BHSd: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention of tokens at `positions_BT` to the cached positions up to their own, [B, H, T, D / H]."""
    S = keys_BHSd.shape[2]
    visible_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    return _softmax_attention(q_BHTd, keys_BHSd, values_BHSd, visible_BTS[:, None], 0.0, None)


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
