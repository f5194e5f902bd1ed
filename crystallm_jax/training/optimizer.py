"""AdamW with the published decay mask, schedule and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.sharding import match_rule, path_name

# Weights of linear layers decay. Embeddings (the output layer with them), LayerNorms and biases do not.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"h_\d+/(attn|mlp)/c_(attn|fc|proj)/kernel", True),
    (r"(wte|wpe)/embedding", False),
    (r"(h_\d+/ln_[12]|ln_f)/(scale|bias)", False),
    (r"h_\d+/(attn|mlp)/c_(attn|fc|proj)/bias", False),
)


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """The rate of each step: from 0 linearly to the peak, then along a cosine to `min_lr`, then constant."""
    if not config.decay_lr:
        return optax.constant_schedule(config.learning_rate)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_iters,
        decay_steps=config.lr_decay_iters,
        end_value=config.min_lr,
    )


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay applies to, a tree of booleans like `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match_rule(path_name(path), DECAY_RULES), params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW as published (epsilon 1e-8 outside the root, decoupled decay); clipping is the step's own."""
    return optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def clip_by_norm(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scale gradients of global norm `norm` down to `limit`; 0 leaves them as they are.

    The 1e-6 is PyTorch's `clip_grad_norm_`, which the published code calls.
    """
    if limit == 0:
        return grads
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)
