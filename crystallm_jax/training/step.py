"""The training state and the compiled steps over it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crystallm_jax.data.packing import Batch
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.model.attention import check_platform
from crystallm_jax.model.compiler import step_options
from crystallm_jax.model.stacking import stacked
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import clip_by_norm, learning_rate_schedule, make_optimizer
from crystallm_jax.training.sharding import (
    BATCH,
    MICRO_BATCHES,
    check_batch_size,
    check_heads,
    state_shardings,
)

THREEFRY = "threefry2x32"

# Targets of this value count for nothing (the published code's ignore_index).
IGNORED_TARGET = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step replaces.

    Attributes:
        step: int32, optimiser steps taken.
        params: float32 parameters of `GPT`.
        opt_state: the optimiser's moments and count.
        skipped: int32, how many of the steps changed nothing, because a loss or gradient was not finite.
        ema: moving average of the parameters, a tree like them; None where the configuration keeps none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    ema: Any = None

    @property
    def exported(self) -> Any:
        """The parameters that are evaluated and exported: their average where there is one."""
        return self.params if self.ema is None else self.ema


class StepMetrics(NamedTuple):
    """What a step reports, float32 scalars on the device (`micro_losses`: [A], one a micro-batch).

    `grad_norm` is taken before clipping, `update_norm` of what was added to the parameters; `skipped` counts (int32)
    the steps so far that changed nothing.
    """

    loss: jax.Array
    micro_losses: jax.Array
    learning_rate: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    update_norm: jax.Array
    skipped: jax.Array


class CompiledSteps(NamedTuple):
    """Jitted functions of one run, with their shardings.

    Attributes:
        train: (state, Batch of [A, B, ...]) -> (state, StepMetrics); the state given is donated.
        evaluate: (params, Batch of [B, ...]) -> mean loss.
        shardings: of a TrainState.
        micro_batches: sharding of each leaf of `train`'s batch.
        batch: sharding of each leaf of `evaluate`'s batch.
        abstract: shapes, dtypes and shardings of the state, for restoring into.
    """

    train: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Any, Batch], jax.Array]
    shardings: TrainState
    micro_batches: NamedSharding
    batch: NamedSharding
    abstract: TrainState


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood in nats of int targets [B, T] under logits [B, T, V], ignored ones left out."""
    counted = targets != IGNORED_TARGET
    # Chosen by comparing, not by indexing, whose gradient would be added into place one by one.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)


def batch_loss(
    config: ModelConfig, params: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Mean loss of predicting tokens [:, 1:] from tokens [:, :-1]; a key switches dropout on.

    The mean is over the targets that count, so a packed batch gives that of its records, each alone, by tokens.
    """
    tokens = jnp.asarray(batch.tokens, jnp.int32)
    logits = GPT(config).apply(
        {"params": params},
        tokens[:, :-1],
        positions=None if batch.positions is None else jnp.asarray(batch.positions, jnp.int32),
        segment_ids=batch.segment_ids,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    targets = tokens[:, 1:]
    if batch.loss_mask is not None:
        targets = jnp.where(batch.loss_mask, targets, IGNORED_TARGET)
    return cross_entropy(logits, targets)


def create_state(config: TrainConfig, params: Any) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        skipped=jnp.zeros((), jnp.int32),
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay > 0 else None,
    )


def train_step(
    config: TrainConfig,
    model_config: ModelConfig,
    state: TrainState,
    batch: Batch,
    *,
    generator: str = THREEFRY,
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step over the micro-batches of a Batch [A, B, ...]; `generator` draws what dropout drops.

    Gradients of the micro-batches are summed, not averaged, before clipping: the published code does not divide.
    """
    dropout = model_config.dropout > 0 or model_config.attention_dropout_rate > 0
    step_key = jax.random.fold_in(jax.random.key(config.seed, impl=generator), state.step)

    def of_micro_batch(number: jax.Array | int, micro_batch: Batch) -> tuple[jax.Array, Any]:
        key = jax.random.fold_in(step_key, number) if dropout else None
        return jax.value_and_grad(lambda p: batch_loss(model_config, p, micro_batch, key))(state.params)

    def add_micro_batch(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, jax.Array]:
        loss, grads = of_micro_batch(*numbered)
        return jax.tree.map(jnp.add, total, grads), loss

    with jax.named_scope("gradients"):
        if len(batch.tokens) == 1:  # alone, it needs no sum beside its gradients
            loss, grads = of_micro_batch(0, jax.tree.map(lambda leaf: leaf[0], batch))
            losses = loss[None]
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, losses = jax.lax.scan(add_micro_batch, zeros, (jnp.arange(len(batch.tokens)), batch))
    grad_norm = optax.tree.norm(grads)
    with jax.named_scope("update"):
        updates, opt_state = make_optimizer(config).update(
            clip_by_norm(grads, grad_norm, config.grad_clip), state.opt_state, state.params
        )
        moved = TrainState(
            step=state.step,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            skipped=state.skipped,
            ema=_averaged(config.ema_decay, state, updates),
        )
        # A loss or gradient that is not finite leaves everything as it was: the run can say so and go on, or stop.
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(losses).all()
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        after = replace(kept, step=state.step + 1, skipped=state.skipped + ~finite)
    metrics = StepMetrics(
        loss=losses.mean(),
        micro_losses=losses,
        # The schedule counts the updates that were made.
        learning_rate=jnp.asarray(learning_rate_schedule(config)(state.step - state.skipped), jnp.float32),
        grad_norm=grad_norm,
        param_norm=optax.tree.norm(after.params),
        update_norm=jnp.where(finite, optax.tree.norm(updates), 0.0),
        skipped=after.skipped,
    )
    return after, metrics


def _averaged(decay: float, state: TrainState, updates: Any) -> Any:
    """The moving average after an update: shorter at the beginning, so that it forgets the initial weights."""
    if state.ema is None:
        return None
    made = (state.step - state.skipped).astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + made) / (10 + made))
    return jax.tree.map(
        lambda ema, param, update: ema + (1 - rate) * (param + update - ema), state.ema, state.params, updates
    )


def dropout_generator(mesh: Mesh) -> str:
    """Which generator draws what dropout drops.

    On a CPU the one whose numbers do not depend on the mesh. An accelerator has a cheaper one in hardware or library:
    the other costs as many operations as a good part of the small model itself. Several draw with the first one too:
    the compiler does not split what the second draws, so each would draw, and hold, the numbers of all.
    """
    return THREEFRY if mesh.size > 1 or mesh.devices.flat[0].platform == "cpu" else "rbg"


def compile_steps(config: TrainConfig, model_config: ModelConfig, mesh: Mesh) -> CompiledSteps:
    """Bind the steps to a mesh; each is compiled once, at its first call.

    Raises:
        ConfigError: the batch or the width does not divide over the mesh.
    """
    check_batch_size(config.batch_size, mesh)
    check_heads(config.n_head, mesh)
    check_platform(config.attention, mesh.devices.flat[0])
    shapes = jax.eval_shape(
        lambda key: create_state(config, init_params(model_config, key)), jax.random.key(0)
    )
    shardings = state_shardings(shapes, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def in_mesh(step: Callable[..., Any]) -> Callable[..., Any]:
        """The step traced where kernels that split themselves can see the mesh."""

        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return step(*arguments)

        return traced

    micro_batches, batch = NamedSharding(mesh, MICRO_BATCHES), NamedSharding(mesh, BATCH)
    train = jax.jit(
        in_mesh(
            lambda state, given: train_step(
                config, model_config, state, given, generator=dropout_generator(mesh)
            )
        ),
        in_shardings=(shardings, micro_batches),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=step_options(mesh),
    )
    evaluate = jax.jit(
        in_mesh(lambda params, given: batch_loss(model_config, params, given)),
        in_shardings=(shardings.params, batch),
        out_shardings=whole,
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return CompiledSteps(train, evaluate, shardings, micro_batches, batch, abstract)


def initial_state(
    config: TrainConfig, model_config: ModelConfig, steps: CompiledSteps, params: Any = None
) -> TrainState:
    """A sharded state: freshly initialised from the seed, or around given parameters, a tree a layer."""
    if params is None:
        key = jax.random.key(config.seed)
        make = jax.jit(
            lambda k: create_state(config, init_params(model_config, k)), out_shardings=steps.shardings
        )
        return make(key)
    if config.layers == "scanned":
        params = stacked(params, config.n_layer)
    # Without the copy, donating the state would delete the caller's arrays.
    placed = jax.tree.map(
        lambda leaf, sharding: jax.device_put(leaf, sharding).copy(), params, steps.shardings.params
    )
    return jax.jit(lambda p: create_state(config, p), out_shardings=steps.shardings)(placed)
