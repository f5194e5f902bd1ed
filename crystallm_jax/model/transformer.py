"""The GPT: a pre-LN decoder-only transformer with learned positions and a tied head, in Flax Linen.

Letters used for shapes, here and everywhere in the package:

    B batch    T tokens    S cache positions    H heads    D width (d = D / H)    V vocabulary    L layers

Parameters are named as in the published checkpoints (`wte`, `wpe`, `h_0/attn/c_attn`, ..., `ln_f`), so that rules
on paths (sharding, weight decay, conversion) read like it. The model carries no sharding: see `training.sharding`.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from crystallm_jax.model.attention import cached_attention, causal_attention, choose_backend, matmul_precision
from crystallm_jax.model.cache import KVCache, append
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.linear import Linear

# GPT-2's initialisation (Radford et al. 2019); branches that add to the residual stream start smaller.
INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5


def _layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    # Two passes over the data for the variance, as the published code does: one pass loses digits in float32.
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPS, use_bias=config.bias, use_fast_variance=False, dtype=config.dtype, name=name
    )


def _linear(config: ModelConfig, features: int, name: str, *, std: float = INIT_STD) -> Linear:
    return Linear(features, use_bias=config.bias, dtype=config.dtype, std=std, name=name)


def _residual_std(config: ModelConfig) -> float:
    return INIT_STD / math.sqrt(2 * config.n_layer)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention, over the tokens given or over a cache and them."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Return the branch's output [B, T, D] and this layer's new cache buffers (None without a cache)."""
        config = self.config
        B, T, _ = x_BTD.shape
        qkv = _linear(config, 3 * config.n_embd, "c_attn")(x_BTD)
        qkv = qkv.reshape(B, T, 3, config.n_head, config.head_dim).transpose(2, 0, 3, 1, 4)
        q_BHTd, k_BHTd, v_BHTd = qkv[0], qkv[1], qkv[2]
        buffers = None
        if cache is None:
            rate = 0.0 if deterministic else config.attention_dropout_rate
            y_BHTd = causal_attention(
                q_BHTd,
                k_BHTd,
                v_BHTd,
                backend=choose_backend(config.attention, dtype=config.dtype, dropout_rate=rate),
                segment_ids_BT=segment_ids_BT,
                dropout_rate=rate,
                dropout_key=self.make_rng("dropout") if rate > 0 else None,
            )
        else:
            with jax.named_scope("cache_update"):
                keys = append(cache.keys[self.layer], k_BHTd, cache.length)
                values = append(cache.values[self.layer], v_BHTd, cache.length)
            y_BHTd = cached_attention(q_BHTd, keys, values, positions_BT)
            buffers = (keys, values)
        y_BTD = y_BHTd.transpose(0, 2, 1, 3).reshape(B, T, config.n_embd)
        y_BTD = _linear(config, config.n_embd, "c_proj", std=_residual_std(config))(y_BTD)
        return nn.Dropout(config.dropout)(y_BTD, deterministic=deterministic), buffers


class MLP(nn.Module):
    """Two linear layers, four times the width between them, with the tanh form of GELU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, deterministic: bool) -> jax.Array:
        """Return the branch's output [B, T, D]."""
        config = self.config
        x = _linear(config, 4 * config.n_embd, "c_fc")(x_BTD)
        x = nn.gelu(x, approximate=True)
        x = _linear(config, config.n_embd, "c_proj", std=_residual_std(config))(x)
        return nn.Dropout(config.dropout)(x, deterministic=deterministic)


class Block(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the residual stream."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Return the residual stream [B, T, D] and this layer's new cache buffers."""
        normed = _layer_norm(self.config, "ln_1")(x_BTD)
        with jax.named_scope("attention"):
            branch, buffers = SelfAttention(self.config, self.layer, name="attn")(
                normed,
                positions_BT=positions_BT,
                segment_ids_BT=segment_ids_BT,
                cache=cache,
                deterministic=deterministic,
            )
        x_BTD = x_BTD + branch
        normed = _layer_norm(self.config, "ln_2")(x_BTD)
        with jax.named_scope("mlp"):
            return x_BTD + MLP(self.config, name="mlp")(normed, deterministic=deterministic), buffers


class GPT(nn.Module):
    """The language model: token ids in, next-token logits out."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """Predict the token that follows each token.

        Args:
            tokens: int [B, T]. Without a cache they stand at positions 0 to T - 1 unless `positions` says otherwise;
                with one, row b continues at position cache.length[b]. The last position must be below `block_size`:
                JAX cannot check it here.
            positions: int [B, T], where several texts share a row; not with a cache.
            segment_ids: int [B, T]: tokens attend to those of their own segment alone; not with a cache.
            cache: what came before, or None.
            deterministic: False switches dropout on and needs an rng named `dropout`.

        Returns:
            float32 logits [B, T, V], and the cache with the tokens added (None without one).

        Raises:
            ValueError: T is more than `block_size`, or positions or segment ids beside a cache.
        """
        config = self.config
        T = tokens.shape[1]
        if config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the model's context of {config.block_size}")
        if cache is not None and not (positions is None and segment_ids is None):
            raise ValueError("positions and segment_ids are for rows read at once, not for a cache")
        start_B = jnp.zeros(tokens.shape[0], jnp.int32) if cache is None else cache.length
        positions_BT = start_B[:, None] + jnp.arange(T)[None, :] if positions is None else positions
        init = nn.initializers.normal(INIT_STD)
        wte = nn.Embed(config.vocab_size, config.n_embd, embedding_init=init, name="wte")
        wpe = nn.Embed(config.block_size, config.n_embd, embedding_init=init, name="wpe")
        # Unless told otherwise every row has the same positions: look them up once.
        position_BTD = wpe(positions_BT[:1] if cache is None and positions is None else positions_BT)
        x_BTD = (wte(tokens) + position_BTD).astype(config.dtype)
        x_BTD = nn.Dropout(config.dropout)(x_BTD, deterministic=deterministic)
        layers = []
        for layer in range(config.n_layer):
            x_BTD, buffers = Block(config, layer, name=f"h_{layer}")(
                x_BTD,
                positions_BT=positions_BT,
                segment_ids_BT=segment_ids,
                cache=cache,
                deterministic=deterministic,
            )
            layers.append(buffers)
        x_BTD = _layer_norm(config, "ln_f")(x_BTD)
        with jax.named_scope("head"):
            logits = jnp.einsum(
                "BTD,VD->BTV",
                x_BTD,
                wte.embedding.astype(config.dtype),
                precision=matmul_precision(x_BTD.dtype),
                preferred_element_type=jnp.float32,
            )
        if cache is None:
            return logits, None
        keys, values = zip(*layers, strict=True)
        return logits, KVCache(keys=keys, values=values, length=cache.length + T)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Freshly initialised float32 parameters, a nested dict."""
    return GPT(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def count_params(params: dict) -> int:
    """Number of parameters, the tied head counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
