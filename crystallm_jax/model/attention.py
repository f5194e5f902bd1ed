"""Causal attention over whole rows: the only place that names a backend.

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
_LANES = 128
# Of cuDNN's fused attention: the widest heads that every device takes, and the oldest compute capability.
_CUDNN_WIDEST, _AMPERE = 128, 8.0


def choose_backend(
    requested: AttentionBackend,
    *,
    dtype: str,
    dropout_rate: float,
    tokens: int,
    head_dim: int,
    segmented: bool,
    platform: str | None = None,
) -> Backend:
    """The backend of full-context attention.

    The fused kernels have no dropout on attention probabilities. cuDNN's takes 16-bit inputs, heads of a multiple of 8
    up to 128, with segments an even number of tokens, on NVIDIA devices from Ampere on; splash on TPU takes rows of a
    multiple of 128 tokens. `auto` takes them where they can be taken. Elsewhere, and on a CPU, it takes the blocked
    form, which keeps no scores for the backward pass: those of the large model would fill a device's memory.

    Args:
        requested: as configured.
        dtype: of the arithmetic.
        dropout_rate: on attention probabilities.
        tokens: T.
        head_dim: d.
        segmented: whether tokens attend to those of their own segment alone.
        platform: `cpu`, `nvidia` or `tpu`; that of the default device unless given (to compile for another).

    Raises:
        ConfigError: a fused kernel is asked for that does not do what is asked of it.
    """
    lacks = {
        "cudnn": {
            f"attention dropout {dropout_rate}": dropout_rate > 0,
            f"dtype={dtype}": dtype != "bfloat16",
            f"heads of width {head_dim}": head_dim % 8 > 0 or head_dim > _CUDNN_WIDEST,
            f"packed rows of {tokens} tokens": segmented and tokens % 2 > 0,
        },
        "splash": {
            f"attention dropout {dropout_rate}": dropout_rate > 0,
            f"rows of {tokens} tokens, no multiple of {_LANES}": tokens % _LANES > 0,
        },
    }
    if requested != "auto":
        missing = [what for what, lacking in lacks.get(requested, {}).items() if lacking]
        if missing:
            raise ConfigError(f"attention={requested} does not do {', '.join(missing)}: set attention=auto")
        return requested
    fused: dict[str, Backend] = {"nvidia": "cudnn", "tpu": "splash"}
    found = fused.get(platform or _platform(jax.devices()[0]), "blocked")
    return "blocked" if any(lacks.get(found, {}).values()) else found


def check_platform(requested: AttentionBackend, device: jax.Device) -> None:
    """Refuse a fused kernel on a device that it does not run on.

    Raises:
        ConfigError: it is asked for.
    """
    needed = {"cudnn": "nvidia", "splash": "tpu"}.get(requested)
    if needed is not None and _platform(device) != needed:
        raise ConfigError(
            f"attention={requested} does not run on {device.device_kind} devices: set attention=auto"
        )


def _platform(device: jax.Device) -> str:
    """`cpu`, `tpu`, `nvidia` for those of its devices that cuDNN's fused attention runs on, or what else it is."""
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        return device.platform
    return "nvidia" if float(getattr(device, "compute_capability", 0)) >= _AMPERE else "gpu"


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
        mask = None if segment_ids_BT is None else _same_segment(segment_ids_BT)
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
        visible = visible & _same_segment(segment_ids_BT)
    return _softmax_attention(q_BHTd, k_BHTd, v_BHTd, visible, dropout_rate, key)


def _same_segment(segment_ids_BT: jax.Array) -> jax.Array:
    """Bool [B, 1, T, T]. Padding is a segment like others: a token always sees itself, so no row is empty (NaN)."""
    return segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]


def _softmax_attention(
    q_BHTd: jax.Array,
    k_BHKd: jax.Array,
    v_BHKd: jax.Array,
    visible: jax.Array,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Over K keys that are visible, bool [B or 1, 1, T, K]."""
    precision = matmul_precision(q_BHTd.dtype)
    scores_BHTK = jnp.einsum(
        "BHTd,BHKd->BHTK", q_BHTd, k_BHKd, precision=precision, preferred_element_type=jnp.float32
    ) / math.sqrt(q_BHTd.shape[-1])
    scores_BHTK = jnp.where(visible, scores_BHTK, -jnp.inf)
    # Softmax by hand: dividing the d outputs instead of the K probabilities of a row reads the large array once less.
    peaks = jax.lax.stop_gradient(scores_BHTK.max(axis=-1, keepdims=True))
    weights_BHTK = jnp.exp(scores_BHTK - peaks)
    sums = weights_BHTK.sum(axis=-1, keepdims=True)
    if dropout_rate > 0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights_BHTK.shape)
        weights_BHTK = jnp.where(keep, weights_BHTK / (1 - dropout_rate), 0.0)
    mixed_BHTd = jnp.einsum(
        "BHTK,BHKd->BHTd",
        weights_BHTK.astype(v_BHKd.dtype),
        v_BHKd,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (mixed_BHTd / sums).astype(v_BHKd.dtype)
