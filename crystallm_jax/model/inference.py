"""The same transformer for decoding: tokens of many rows as the columns of one matrix.

    N columns: tokens read at once, whatever rows they belong to, so activations are [D, N].

Products are then of a matrix [E, D] and columns [D, N], which for the few columns of a decoding step is twice as fast
on a CPU as rows times [D, E], and nothing has to be transposed between layers. Where keys and values come from is the
caller's affair. Parameters are laid out once, by `prepare_weights`. `tests/test_inference.py` holds it to `GPT`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.elementwise import gelu
from crystallm_jax.model.precision import matmul_precision
from crystallm_jax.model.transformer import LAYER_NORM_EPS

# (layer, queries, keys, values), each [H, d, N], to the mixed values [H, d, N].
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class Affine(NamedTuple):
    """A kernel [*E, D], or a scale [D], and the bias of its output (None without)."""

    kernel: jax.Array
    bias: jax.Array | None


class LayerWeights(NamedTuple):
    """One block: `ln_1`, `c_attn` [3, D, D], `c_proj` [D, D], `ln_2`, `c_fc` [4 D, D], `c_proj` [D, 4 D]."""

    ln_1: Affine
    attention_in: Affine
    attention_out: Affine
    ln_2: Affine
    mlp_in: Affine
    mlp_out: Affine


class Weights(NamedTuple):
    """A model's parameters as decoding reads them; kernels in the dtype of the arithmetic."""

    wte: jax.Array
    wpe: jax.Array
    layers: tuple[LayerWeights, ...]
    ln_f: Affine

    @property
    def nbytes(self) -> int:
        """Bytes that a decoding step reads."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.wte, self.layers)))


def prepare_weights(config: ModelConfig, params: dict) -> Weights:
    """Lay the parameters of an unrolled model out for decoding."""

    def linear(tree: dict) -> Affine:
        kernel = jnp.moveaxis(tree["kernel"], 0, -1).astype(config.dtype)
        bias = tree.get("bias")
        return Affine(kernel, None if bias is None else bias.astype(config.dtype))

    def norm(tree: dict) -> Affine:
        return Affine(tree["scale"], tree.get("bias"))

    blocks = (params[f"h_{layer}"] for layer in range(config.n_layer))
    return Weights(
        wte=params["wte"]["embedding"].astype(config.dtype),
        wpe=params["wpe"]["embedding"].astype(config.dtype),
        layers=tuple(
            LayerWeights(
                ln_1=norm(block["ln_1"]),
                attention_in=linear(block["attn"]["c_attn"]),
                attention_out=linear(block["attn"]["c_proj"]),
                ln_2=norm(block["ln_2"]),
                mlp_in=linear(block["mlp"]["c_fc"]),
                mlp_out=linear(block["mlp"]["c_proj"]),
            )
            for block in blocks
        ),
        ln_f=norm(params["ln_f"]),
    )


# Compiled once a shape of model.
prepared_weights = jax.jit(prepare_weights, static_argnums=0)


def read_columns(
    config: ModelConfig, weights: Weights, tokens: jax.Array, positions: jax.Array, *, attend: Attend
) -> jax.Array:
    """Next-token logits, float32 [N, V], of tokens [N] at positions [N].

    Args:
        config: the model's shape.
        weights: as prepared.
        tokens: int [N].
        positions: int [N], below `block_size`.
        attend: for each layer, what the tokens see; it is given the new keys and values to keep.
    """
    H, d, N = config.n_head, config.head_dim, tokens.shape[0]
    x_DN = (jnp.take(weights.wte, tokens, axis=0) + jnp.take(weights.wpe, positions, axis=0)).T
    for number, layer in enumerate(weights.layers):
        with jax.named_scope(f"h_{number}"):
            qkv = _linear(layer.attention_in, _normalise(x_DN, layer.ln_1)).reshape(3, H, d, N)
            mixed_HdN = jax.lax.optimization_barrier(attend(number, qkv[0], qkv[1], qkv[2]))
            x_DN = x_DN + _linear(layer.attention_out, mixed_HdN.astype(x_DN.dtype).reshape(H * d, N))
            hidden = gelu(_linear(layer.mlp_in, _normalise(x_DN, layer.ln_2)))
            x_DN = x_DN + _linear(layer.mlp_out, hidden)
    with jax.named_scope("head"):
        return _product(weights.wte, _normalise(x_DN, weights.ln_f)).T


def _product(kernel: jax.Array, x_DN: jax.Array) -> jax.Array:
    """Kernel [*E, D] times [D, N], summed in float32: float32 [*E, N]."""
    return jax.lax.dot_general(
        kernel,
        x_DN,
        (((kernel.ndim - 1,), (0,)), ((), ())),
        precision=matmul_precision(x_DN.dtype),
        preferred_element_type=jnp.float32,
    )


def _linear(affine: Affine, x_DN: jax.Array) -> jax.Array:
    y = _product(affine.kernel, x_DN).astype(x_DN.dtype)
    return y if affine.bias is None else y + affine.bias[..., None]


def _normalise(x_DN: jax.Array, norm: Affine) -> jax.Array:
    """LayerNorm of each column, in float32; the variance in a second pass, as `model.elementwise` has it."""
    wide = x_DN.astype(jnp.float32)
    centred = wide - wide.mean(0)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(0) + LAYER_NORM_EPS) * norm.kernel[:, None]
    return (y if norm.bias is None else y + norm.bias[:, None]).astype(x_DN.dtype)
