"""The GPT: a pre-LN decoder-only transformer with learned positions and a tied head, in Flax Linen.

Letters used for shapes, here and everywhere in the package:

    B batch    T tokens    H heads    D width (d = D / H)    V vocabulary    L layers    S positions of a page

Parameters are named as in the published checkpoints (`wte`, `wpe`, `h_0/attn/c_attn`, ..., `ln_f`), so that rules
on paths (sharding, weight decay, conversion) read like it. The kernel of `c_attn` is [D, 3, D], so that queries, keys
and values can each be split by heads. With `layers: scanned` the blocks' parameters are one tree `h` with a leading L
(see `model.layout`). How parameters are split over devices is not stated here: see `training.sharding`. Decoding reads
the same parameters in a layout of its own: see `model.inference`, and `model.pages` for what it keeps.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn

from crystallm_jax.model.attention import causal_attention, choose_backend
from crystallm_jax.model.axes import split_by_rows
from crystallm_jax.model.blocked import ATTENTION_RESIDUALS
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.elementwise import LayerNorm, gelu
from crystallm_jax.model.linear import LINEAR_OUTPUT, Linear, lookup, tied_logits
from crystallm_jax.model.stacking import stacked

# GPT-2's initialisation (Radford et al. 2019); branches that add to the residual stream start smaller.
INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5


def _layer_norm(config: ModelConfig, name: str) -> LayerNorm:
    return LayerNorm(use_bias=config.bias, dtype=config.dtype, epsilon=LAYER_NORM_EPS, name=name)


def _linear(config: ModelConfig, features: tuple[int, ...], name: str, *, std: float = INIT_STD) -> Linear:
    return Linear(features, use_bias=config.bias, dtype=config.dtype, std=std, name=name)


def _residual_std(config: ModelConfig) -> float:
    return INIT_STD / math.sqrt(2 * config.n_layer)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
        """Return the branch's output [B, T, D]."""
        config = self.config
        B, T, D = x_BTD.shape
        qkv = _linear(config, (3, D), "c_attn")(x_BTD)
        qkv = qkv.reshape(B, T, 3, config.n_head, config.head_dim).transpose(2, 0, 3, 1, 4)
        q_BHTd, k_BHTd, v_BHTd = qkv[0], qkv[1], qkv[2]
        rate = 0.0 if self.deterministic else config.attention_dropout_rate
        y_BHTd = causal_attention(
            q_BHTd,
            k_BHTd,
            v_BHTd,
            backend=choose_backend(
                config.attention,
                dtype=config.dtype,
                dropout_rate=rate,
                tokens=T,
                head_dim=config.head_dim,
                segmented=segment_ids_BT is not None,
            ),
            segment_ids_BT=segment_ids_BT,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate > 0 else None,
        )
        y_BTD = y_BHTd.transpose(0, 2, 1, 3).reshape(B, T, D)
        y_BTD = _linear(config, (D,), "c_proj", std=_residual_std(config))(y_BTD)
        return nn.Dropout(config.dropout)(y_BTD, deterministic=self.deterministic)


class MLP(nn.Module):
    """Two linear layers, four times the width between them, with the tanh form of GELU."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the branch's output [B, T, D]."""
        config = self.config
        x = _linear(config, (4 * config.n_embd,), "c_fc")(x_BTD)
        x = gelu(x)
        x = _linear(config, (config.n_embd,), "c_proj", std=_residual_std(config))(x)
        return nn.Dropout(config.dropout)(x, deterministic=self.deterministic)


class Block(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the residual stream."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> tuple[jax.Array, None]:
        """Return the residual stream [B, T, D], and nothing beside it, as a scan over blocks wants it."""
        normed = _layer_norm(self.config, "ln_1")(x_BTD)
        with jax.named_scope("attention"):
            x_BTD = x_BTD + SelfAttention(self.config, self.deterministic, name="attn")(
                normed, segment_ids_BT
            )
        normed = _layer_norm(self.config, "ln_2")(x_BTD)
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + MLP(self.config, self.deterministic, name="mlp")(normed)
        return split_by_rows(x_BTD), None


def _block_class(config: ModelConfig) -> type[Block]:
    """The block, with what its backward pass computes again."""
    if config.remat == "none":
        return Block
    policy = {
        "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT, ATTENTION_RESIDUALS),
        "full": jax.checkpoint_policies.nothing_saveable,
    }[config.remat]
    # Inside a scan nothing is common between iterations that the compiler could merge again.
    return nn.remat(Block, policy=policy, prevent_cse=config.layers == "unrolled")


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
        deterministic: bool = True,
    ) -> jax.Array:
        """Predict the token that follows each token.

        Args:
            tokens: int [B, T]. They stand at positions 0 to T - 1 unless `positions` says otherwise.
            positions: int [B, T], where several texts share a row. All must be below `block_size`: JAX cannot check
                it here.
            segment_ids: int [B, T]: tokens attend to those of their own segment alone.
            deterministic: False switches dropout on and needs an rng named `dropout`.

        Returns:
            float32 logits [B, T, V].

        Raises:
            ValueError: T is more than `block_size`.
        """
        config = self.config
        T = tokens.shape[1]
        if config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the model's context of {config.block_size}")
        init = nn.initializers.normal(INIT_STD)
        wte = nn.Embed(config.vocab_size, config.n_embd, embedding_init=init, name="wte")
        wpe = nn.Embed(config.block_size, config.n_embd, embedding_init=init, name="wpe")
        # Without positions every row has the same.
        same_TD = wpe.embedding[:T]
        position_BTD = same_TD if positions is None else lookup(wpe.embedding, positions, config.dtype)
        x_BTD = (lookup(wte.embedding, tokens, config.dtype) + position_BTD).astype(config.dtype)
        x_BTD = split_by_rows(nn.Dropout(config.dropout)(x_BTD, deterministic=deterministic))
        x_BTD = self._blocks(x_BTD, segment_ids, deterministic)
        x_BTD = _layer_norm(config, "ln_f")(x_BTD)
        with jax.named_scope("head"):
            return tied_logits(x_BTD, wte.embedding)

    def _blocks(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None, deterministic: bool) -> jax.Array:
        """All blocks one after the other, or one scanned over stacked parameters."""
        config = self.config
        block = _block_class(config)
        if config.layers == "scanned":
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.n_layer,
            )
            x_BTD, _ = scanned(config, deterministic, name="h")(x_BTD, segment_ids_BT)
            return x_BTD
        for layer in range(config.n_layer):
            x_BTD, _ = block(config, deterministic, name=f"h_{layer}")(x_BTD, segment_ids_BT)
        return x_BTD


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Freshly initialised float32 parameters, a nested dict."""
    # The fused kernels do not take one token; parameters do not depend on them.
    plain = replace(config, attention="xla", remat="none", layers="unrolled")
    params = GPT(plain).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    # Stacked afterwards, so that a seed means the same model in both layouts.
    return stacked(params, config.n_layer) if config.layers == "scanned" else params


def count_params(params: dict) -> int:
    """Number of parameters, the tied head counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
