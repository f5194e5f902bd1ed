"""AdamW with the published decay mask, schedule and clipping, and Muon for the matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.sharding import match_rule, path_name

# Weights of linear layers decay. Embeddings (the output layer with them), LayerNorms and biases do not. Layers have
# trees of their own (`h_0`) or are stacked (`h`).
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"h(_\d+)?/(attn|mlp)/c_(attn|fc|proj)/kernel", True),
    (r"(wte|wpe)/embedding", False),
    (r"(h(_\d+)?/ln_[12]|ln_f)/(scale|bias)", False),
    (r"h(_\d+)?/(attn|mlp)/c_(attn|fc|proj)/bias", False),
)

# Which axes of a kernel make a matrix, from inputs to outputs. Each of the others counts matrices: layers, where they
# are stacked, and queries, keys and values ([D, 3, D]), which are three.
MATRIX_RULES: tuple[tuple[str, MuonDimensionNumbers], ...] = (
    (r"h(_\d+)?/attn/c_attn/kernel", MuonDimensionNumbers(-3, -1)),
    (r"h(_\d+)?/(attn/c_proj|mlp/c_fc|mlp/c_proj)/kernel", MuonDimensionNumbers(-2, -1)),
)

# Of Muon's momentum (K. Jordan, 2024).
MUON_BETA = 0.95
# The root mean square of Muon's updates, like that of AdamW's, so that learning rate and decay keep their meaning
# (J. Liu et al., arXiv 2502.16982).
MUON_RMS = 0.2


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """The rate after so many steps: from 0 linearly to the peak, and down to `min_lr` as the schedule has it.

    `cosine` falls from the end of the warm-up to `lr_decay_iters` and is constant then; `wsd` is constant first and
    falls linearly over the last `decay_iters` steps before `max_iters`.
    """
    if not config.decay_lr:
        return optax.constant_schedule(config.learning_rate)
    match config.lr_schedule:
        case "cosine":
            return optax.warmup_cosine_decay_schedule(
                init_value=0.0,
                peak_value=config.learning_rate,
                warmup_steps=config.warmup_iters,
                decay_steps=config.lr_decay_iters,
                end_value=config.min_lr,
            )
        case "wsd":
            return _warmup_stable_decay(config)


def _warmup_stable_decay(config: TrainConfig) -> optax.Schedule:
    peak, stable_until = config.learning_rate, config.max_iters - config.decay_iters
    stages = [optax.linear_schedule(0.0, peak, config.warmup_iters), optax.constant_schedule(peak)]
    boundaries = [config.warmup_iters]
    if config.decay_iters > 0:
        stages.append(optax.linear_schedule(peak, config.min_lr, config.decay_iters))
        boundaries.append(stable_until)
    return optax.join_schedules(stages, boundaries)


def decay_mask(params: Any) -> Any:
    """Which parameters weight decay applies to, a tree of booleans like `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match_rule(path_name(path), DECAY_RULES), params)


def matrix_axes(kernels: Any) -> Any:
    """The axes of the matrices in each kernel, a tree like `kernels`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: match_rule(path_name(path), MATRIX_RULES), kernels
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """What turns clipped gradients into updates; clipping is the step's own."""
    match config.optimizer:
        case "adamw":
            return _adamw(config)
        case "muon":
            return optax.partition({"muon": _muon(config), "adamw": _adamw(config)}, _movers)


def _adamw(config: TrainConfig) -> optax.GradientTransformation:
    """As published: epsilon 1e-8 outside the root, decoupled decay."""
    return optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _movers(params: Any) -> Any:
    """What moves each parameter: Muon those that decay."""
    return jax.tree.map(lambda decays: "muon" if decays else "adamw", decay_mask(params))


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    """Steps along the nearest orthogonal matrix of the momentum, for trees of kernels alone.

    `optax.contrib.muon` is made of the same; its own Adam for the rest is another one (Nesterov's).
    """
    return optax.chain(
        scale_by_muon(beta=MUON_BETA, weight_dimension_numbers=matrix_axes),
        optax.stateless(_scale_to_rms),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )


def _scale_to_rms(orthogonal: Any, _: Any) -> Any:
    """Orthogonal matrices with entries of `MUON_RMS`: a matrix of n orthonormal rows of length m has 1 / sqrt(m)."""

    def scaled(matrices: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        longest = max(matrices.shape[axes.reduction_axis], matrices.shape[axes.output_axis])
        return MUON_RMS * longest**0.5 * matrices

    return jax.tree.map(scaled, orthogonal, matrix_axes(orthogonal))


def clip_by_norm(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scale gradients of global norm `norm` down to `limit`; 0 leaves them as they are.

    The 1e-6 is PyTorch's `clip_grad_norm_`, which the published code calls.
    """
    if limit == 0:
        return grads
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)
