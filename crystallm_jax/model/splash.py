"""Fused causal attention on TPU: JAX's splash kernel, which skips the blocks that the causal mask hides.

The compiler cannot split a kernel of this kind by itself. Under a mesh (`jax.sharding.use_abstract_mesh`) each device
runs it on its own rows and heads.
"""

import math
from collections.abc import Callable

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from crystallm_jax.model.axes import BATCH_AXES, TENSOR

# Rows and columns of scores at a time, multiples of the 128 lanes of the vector unit; larger blocks do not fit into the
# on-chip memory with the backward pass.
_BLOCKS = (512, 384, 256, 128)


def splash_causal_attention(
    q_BHTd: jax.Array,
    k_BHTd: jax.Array,
    v_BHTd: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    residual_name: str,
    interpret: bool = False,
) -> jax.Array:
    """Attention of each token to itself and those before it in its segment, [B, H, T, D / H].

    Args:
        q_BHTd: queries; T is a multiple of 128.
        k_BHTd: keys.
        v_BHTd: values.
        segment_ids_BT: tokens see those of their own segment alone; None makes a row one segment.
        residual_name: under which rematerialisation policies find what the backward pass needs.
        interpret: runs the kernel step by step on any platform, for tests.
    """
    q_BHTd = q_BHTd / math.sqrt(q_BHTd.shape[-1])

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        kernel = _kernel(q.shape[1], q.shape[2], residual_name, interpret)
        if segments is None:
            return jax.vmap(kernel)(q, k, v)
        pairs = splash_attention.SegmentIds(segments, segments)
        return jax.vmap(kernel)(q, k, v, pairs)

    operands = (q_BHTd, k_BHTd, v_BHTd)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*operands, segment_ids_BT)
    heads, rows = PartitionSpec(BATCH_AXES, TENSOR, None, None), PartitionSpec(BATCH_AXES, None)
    # Pallas calls do not say which of their results vary over the mesh.
    split = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return split(*operands, segment_ids_BT)


def _kernel(heads: int, tokens: int, residual_name: str, interpret: bool) -> Callable[..., jax.Array]:
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((tokens, tokens))] * heads)
    block = next(size for size in _BLOCKS if tokens % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=residual_name, interpret=interpret
    )
