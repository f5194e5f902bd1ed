"""The transformer in NumPy: whole rows at once, or a token of each row behind keys and values that were kept.

Letters as in `crystallm_jax.model.transformer`, whose arithmetic this repeats in float32. Tokens of all rows are the
rows of one matrix, [N, D], so that every linear layer is one product with its kernel as it is stored, [D, E].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.model.config import ModelConfig

# As in the JAX model, which cannot be imported here: GPT-2's.
LAYER_NORM_EPS = np.float32(1e-5)
_SLOPE, _CUBIC = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
# Where exp() of it is still finite, and what is added to it no longer counts.
_STEEPEST = np.float32(80)

# (layer, queries, keys, values), each [B, H, T, d], to the mixed values, likewise.
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Affine(NamedTuple):
    """A kernel [D, E], or a scale [D], and the bias of its output (None without)."""

    kernel: np.ndarray
    bias: np.ndarray | None


class Layer(NamedTuple):
    """One block: `ln_1`, `c_attn` [D, 3 D], `c_proj` [D, D], `ln_2`, `c_fc` [D, 4 D], `c_proj` [4 D, D]."""

    ln_1: Affine
    attention_in: Affine
    attention_out: Affine
    ln_2: Affine
    mlp_in: Affine
    mlp_out: Affine


class Network(NamedTuple):
    """A model's shape and parameters; `head` [D, V] is the transpose of `wte` [V, D], laid out for products."""

    config: ModelConfig
    wte: np.ndarray
    wpe: np.ndarray
    head: np.ndarray
    layers: tuple[Layer, ...]
    ln_f: Affine


class Cache(NamedTuple):
    """Keys and values of rows, float32 [L, B, H, S, d]; beyond a row's length lies whatever is finite."""

    keys: np.ndarray
    values: np.ndarray


class Reading(NamedTuple):
    """What was read of one text: keys and values [L, H, T, d], and the logits [V] of the token that follows."""

    keys: np.ndarray
    values: np.ndarray
    logits: np.ndarray


def prepare(config: ModelConfig, params: dict[str, Any]) -> Network:
    """Take the parameters of an unrolled model; kernels are not copied."""

    def affine(tree: dict[str, Any]) -> Affine:
        if "scale" in tree:
            return Affine(np.asarray(tree["scale"]), tree.get("bias"))
        kernel = np.ascontiguousarray(tree["kernel"], np.float32)
        bias = tree.get("bias")
        return Affine(kernel.reshape(len(kernel), -1), None if bias is None else np.asarray(bias).reshape(-1))

    blocks = (params[f"h_{number}"] for number in range(config.n_layer))
    wte = np.ascontiguousarray(params["wte"]["embedding"], np.float32)
    return Network(
        config,
        wte,
        np.ascontiguousarray(params["wpe"]["embedding"], np.float32),
        np.ascontiguousarray(wte.T),
        tuple(
            Layer(
                affine(block["ln_1"]),
                affine(block["attn"]["c_attn"]),
                affine(block["attn"]["c_proj"]),
                affine(block["ln_2"]),
                affine(block["mlp"]["c_fc"]),
                affine(block["mlp"]["c_proj"]),
            )
            for block in blocks
        ),
        affine(params["ln_f"]),
    )


def whole_logits(network: Network, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [B, T, V] of int tokens [B, T]."""
    B, T = tokens.shape
    x_ND = _hidden(network, tokens, np.arange(T), _causal)
    return (x_ND @ network.head).reshape(B, T, -1)


def read_text(network: Network, tokens: np.ndarray) -> Reading:
    """Read the beginning of a text, int [T]."""
    keys, values = [], []

    def attend(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        keys.append(k[0])
        values.append(v[0])
        return _causal(layer, q, k, v)

    x_ND = _hidden(network, tokens[None], np.arange(len(tokens)), attend)
    return Reading(np.stack(keys), np.stack(values), x_ND[-1] @ network.head)


def empty_cache(config: ModelConfig, rows: int, positions: int) -> Cache:
    """A cache of so many rows; memory is taken as it is written to, where the system does so."""
    shape = (config.n_layer, rows, config.n_head, positions, config.head_dim)
    return Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def step(network: Network, cache: Cache, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits float32 [B, V] of tokens [B] at positions [B] of the cache's first B rows, which keep them."""
    B = len(tokens)
    rows, longest = np.arange(B), int(positions.max()) + 1
    unseen = np.arange(longest) > positions[:, None]
    bars = np.where(unseen, -np.inf, 0).astype(np.float32)[:, None] if unseen.any() else None

    def attend(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        keys, values = cache.keys[layer, :B], cache.values[layer, :B]
        keys[rows, :, positions] = k[:, :, 0]
        values[rows, :, positions] = v[:, :, 0]
        # Not matrix products: as many as there are rows and heads, each so small that sharing it out over threads
        # costs more than it brings, and ten times as much on a busy machine.
        scores = np.einsum("BHSd,BHd->BHS", keys[:, :, :longest], q[:, :, 0])
        if bars is not None:
            scores += bars
        sums = _exponentiate(scores)
        return (np.einsum("BHS,BHSd->BHd", scores, values[:, :, :longest]) / sums)[:, :, None]

    return _hidden(network, tokens[:, None], positions[:, None], attend) @ network.head


def _hidden(network: Network, tokens: np.ndarray, positions: np.ndarray, attend: Attend) -> np.ndarray:
    """What the head reads, [B T, D], of tokens [B, T] at positions [B, T] or [T]."""
    config = network.config
    (B, T), H, d = tokens.shape, config.n_head, config.head_dim
    x_ND = (network.wte[tokens] + network.wpe[positions]).reshape(B * T, -1)
    softening = np.float32(1 / math.sqrt(d))
    for number, layer in enumerate(network.layers):
        qkv = _linear(layer.attention_in, _normalised(layer.ln_1, x_ND))
        qkv = qkv.reshape(B, T, 3, H, d).transpose(2, 0, 3, 1, 4)
        mixed_BHTd = attend(number, qkv[0] * softening, qkv[1], qkv[2])
        x_ND = x_ND + _linear(layer.attention_out, mixed_BHTd.swapaxes(1, 2).reshape(B * T, H * d))
        x_ND += _linear(layer.mlp_out, _gelu(_linear(layer.mlp_in, _normalised(layer.ln_2, x_ND))))
    return _normalised(network.ln_f, x_ND)


def _causal(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    del layer
    scores, T = q @ k.swapaxes(2, 3), q.shape[2]
    scores += np.triu(np.full((T, T), -np.inf, np.float32), 1)
    sums = _exponentiate(scores)
    return (scores @ v) / sums


def _exponentiate(scores: np.ndarray) -> np.ndarray:
    """Turn scores [..., S] into their softmax times the sums [..., 1] that are returned."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    sums: np.ndarray = scores.sum(-1, keepdims=True)
    return sums


def _linear(affine: Affine, x_ND: np.ndarray) -> np.ndarray:
    y = x_ND @ affine.kernel
    if affine.bias is not None:
        y += affine.bias
    return y


def _normalised(norm: Affine, x_ND: np.ndarray) -> np.ndarray:
    """LayerNorm; the variance in a second pass."""
    width = np.float32(x_ND.shape[1])
    centred = x_ND - np.add.reduce(x_ND, axis=1, keepdims=True) / width
    variance = np.add.reduce(centred * centred, axis=1, keepdims=True) / width
    centred /= np.sqrt(variance + LAYER_NORM_EPS)
    centred *= norm.kernel
    if norm.bias is not None:
        centred += norm.bias
    return centred


def _gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form, which is x times the logistic function: NumPy has a fast exp() everywhere."""
    steep = x * x
    steep *= -2 * _SLOPE * _CUBIC
    steep -= 2 * _SLOPE
    steep *= x
    np.minimum(steep, _STEEPEST, out=steep)
    np.exp(steep, out=steep)
    steep += 1
    np.divide(x, steep, out=steep)
    return steep
