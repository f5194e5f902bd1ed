"""A training step: what it computes, and that it computes the same on every mesh."""

import dataclasses
import json
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.data.packing import Batch
from crystallm_jax.errors import ConfigError
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.models import read_published
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import clip_by_norm, decay_mask, learning_rate_schedule
from crystallm_jax.training.sharding import make_mesh, parameter_specs
from crystallm_jax.training.step import (
    CompiledSteps,
    batch_loss,
    compile_steps,
    create_state,
    cross_entropy,
    dropout_generator,
    initial_state,
    train_step,
)

STEP_TOLERANCE = 1e-4

OWN = TrainConfig(
    gradient_accumulation_steps=2,
    batch_size=4,
    block_size=16,
    n_layer=1,
    n_head=2,
    n_embd=32,
    bias=True,
    learning_rate=1e-2,
    min_lr=1e-3,
    warmup_iters=1,
    lr_decay_iters=8,
    beta2=0.99,
    grad_clip=1.0,
    dtype="float32",
)
OWN_MODEL = OWN.model_config(29)


def _steps(config: TrainConfig, model_config: ModelConfig) -> CompiledSteps:
    return compile_steps(config, model_config, make_mesh(1, 1, jax.devices()[:1]))


@pytest.fixture(scope="module")
def steps() -> CompiledSteps:
    return _steps(OWN, OWN_MODEL)


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    return np.random.default_rng(0).integers(0, OWN_MODEL.vocab_size, (5, 2, 4, 17)).astype(np.uint16)


def _names(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(tree)))


@jax.jit
def _mean_loss_and_gradient(params: Any, tokens: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        logits = GPT(OWN_MODEL).apply({"params": params}, tokens[:, :-1])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    return jax.value_and_grad(loss)(params)


@jax.jit
def _packed_loss_and_gradient(params: Any, batch: Batch) -> Any:
    return jax.value_and_grad(lambda p: batch_loss(OWN_MODEL, p, batch))(params)


def _by_hand(
    params: Any, batches: np.ndarray, *, sums: float, clip: float, decayed: str = "kernel"
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The published step in plain NumPy: the gradient is `sums` times that of all micro-batches' mean."""
    tree = jax.tree.structure(params)
    first = second = 0.0
    report = []
    for step, micro_batches in enumerate(batches.astype(np.int32)):
        loss, gradient = _mean_loss_and_gradient(params, micro_batches.reshape(-1, micro_batches.shape[-1]))
        gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) * sums, gradient)
        norm = _norm(gradient)
        scale = min(1.0, clip / norm) if clip else 1.0
        # Warm-up from 0 over one step, then half a cosine over seven.
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / 7))
        rate = 0.0 if step == 0 else 1e-3 + cosine * (1e-2 - 1e-3)
        flat = {name: leaf * scale for name, leaf in _names(gradient).items()}
        first = {name: 0.9 * (first[name] if step else 0) + 0.1 * leaf for name, leaf in flat.items()}
        second = {name: 0.99 * (second[name] if step else 0) + 0.01 * leaf**2 for name, leaf in flat.items()}
        updated = {}
        for name, leaf in _names(params).items():
            move = first[name] / (1 - 0.9 ** (step + 1))
            move = move / (np.sqrt(second[name] / (1 - 0.99 ** (step + 1))) + 1e-8)
            decay = 0.1 if decayed in name else 0.0
            updated[name] = leaf - rate * (move + decay * leaf)
        params = jax.tree.unflatten(tree, list(updated.values()))
        report.append({"loss": float(loss), "lr": rate, "grad_norm": norm, "param_norm": _norm(params)})
    return report, _names(params)


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_a_step_sums_gradients_clips_and_decays_as_published(
    clip: float, steps: CompiledSteps, batches: np.ndarray
) -> None:
    config = dataclasses.replace(OWN, grad_clip=clip)
    compiled = steps if config == OWN else _steps(config, OWN_MODEL)
    state = initial_state(config, OWN_MODEL, compiled)
    start = jax.device_get(state.params)
    expected, final = _by_hand(start, batches, sums=2, clip=clip)
    if clip:
        # Otherwise the choices below would not show: the sum is clipped, the mean would not be.
        assert all(step["grad_norm"] / 2 < clip < step["grad_norm"] for step in expected)
    for number, wanted in enumerate(expected):
        state, metrics = compiled.train(state, Batch(batches[number]))
        assert float(metrics.loss) == pytest.approx(wanted["loss"], abs=1e-5)
        assert float(metrics.micro_losses.mean()) == pytest.approx(wanted["loss"], abs=1e-5)
        assert float(metrics.learning_rate) == pytest.approx(wanted["lr"], rel=1e-5)
        assert float(metrics.grad_norm) == pytest.approx(wanted["grad_norm"], rel=1e-5)
        assert float(metrics.param_norm) == pytest.approx(wanted["param_norm"], rel=1e-5)
    assert int(state.step) == len(expected)

    def distance(other: dict[str, np.ndarray]) -> float:
        found = _names(jax.device_get(state.params))
        return max(float(np.abs(leaf - other[name]).mean()) for name, leaf in found.items())

    assert distance(final) < 1e-5
    assert distance(_by_hand(start, batches, sums=2, clip=clip, decayed="/")[1]) > 1e-4
    if clip:
        assert distance(_by_hand(start, batches, sums=1, clip=clip)[1]) > 1e-4
        assert distance(_by_hand(start, batches, sums=2, clip=0)[1]) > 1e-4


def test_sixty_steps_give_the_published_trajectory(golden: Path) -> None:
    settings = json.loads((golden / "train" / "settings.json").read_text())["settings"]
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    start = read_published(golden / "train" / "init_ckpt.pt")
    shape = {name: getattr(start.config, name) for name in ("n_layer", "n_head", "n_embd", "bias")}
    config = TrainConfig(**shape, **{name: value for name, value in settings.items() if name in known})
    compiled = _steps(config, start.config)
    state = initial_state(config, start.config, compiled, start.params)
    recorded = np.load(golden / "train" / "trajectory.npz")
    batches = np.load(golden / "train" / "batches.npz")["batches"]
    found = []
    for micro_batches in batches:
        state, metrics = compiled.train(state, Batch(micro_batches))
        found.append(metrics)
    found = jax.device_get(found)
    assert len(found) == 60
    for ours, theirs in (
        ("micro_losses", "losses"),
        ("learning_rate", "lr"),
        ("grad_norm", "grad_norm"),
        ("param_norm", "param_norm"),
    ):
        values = np.stack([getattr(metrics, ours) for metrics in found])
        np.testing.assert_allclose(values, recorded[theirs], rtol=0, atol=STEP_TOLERANCE, err_msg=theirs)
    end = read_published(golden / "train" / "final_ckpt.pt")
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=STEP_TOLERANCE),
        jax.device_get(state.params),
        end.params,
    )


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_losses_are_the_published_ones(name: str, golden: Path) -> None:
    recorded = np.load(golden / "model" / name / "logits.npz")
    logits = jnp.asarray(recorded["logits"])
    assert float(cross_entropy(logits, recorded["targets"])) == pytest.approx(recorded["loss"], abs=1e-5)
    masked = float(cross_entropy(logits, recorded["targets_masked"]))
    assert masked == pytest.approx(recorded["loss_masked"], abs=1e-5)


def test_ignored_targets_count_for_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[0, -1, 4], [-1, 2, -1]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = [probabilities[0, 0, 0], probabilities[0, 2, 4], probabilities[1, 1, 2]]
    assert float(cross_entropy(logits, targets)) == pytest.approx(-np.log(counted).mean(), abs=1e-6)
    assert float(cross_entropy(logits, np.full((2, 3), -1))) == 0


def test_evaluation_gives_the_mean_loss(steps: CompiledSteps, batches: np.ndarray) -> None:
    params = initial_state(OWN, OWN_MODEL, steps).params
    expected, _ = _mean_loss_and_gradient(params, batches[0].reshape(8, 17).astype(np.int32))
    parts = [float(steps.evaluate(params, Batch(part))) for part in batches[0]]
    assert np.mean(parts) == pytest.approx(float(expected), abs=1e-5)


RECORD_LENGTHS = ((8, 8), (17,), (8,), (1, 8, 8))


def _packed(tokens: np.ndarray) -> Batch:
    """Rows [4, 17] whose records have these lengths."""
    segments, positions = np.zeros((4, 17), np.uint16), np.zeros((4, 17), np.uint16)
    for row, lengths in enumerate(RECORD_LENGTHS):
        filled = sum(lengths)
        segments[row, :filled] = np.repeat(np.arange(len(lengths)) + 1, lengths)
        positions[row, :filled] = np.concatenate([np.arange(length) for length in lengths])
    mask = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    return Batch(tokens, segments[:, :-1], positions[:, :-1], mask)


def test_the_loss_of_packed_rows_is_that_of_their_records_alone_weighted_by_tokens(
    steps: CompiledSteps, batches: np.ndarray
) -> None:
    params = initial_state(OWN, OWN_MODEL, steps).params
    packed = _packed(batches[0, 0])
    total, count = jnp.zeros(()), 0
    gradients = jax.tree.map(jnp.zeros_like, params)
    for row, lengths in zip(batches[0, 0], RECORD_LENGTHS, strict=True):
        for first, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            if length > 1:
                record = row[None, first : first + length].astype(np.int32)
                loss, gradient = _mean_loss_and_gradient(params, record)
                total, count = total + loss * (length - 1), count + length - 1
                gradients = jax.tree.map(lambda sum_, new, n=length - 1: sum_ + new * n, gradients, gradient)
    assert packed.loss_mask.sum() == count
    loss, gradient = _packed_loss_and_gradient(params, packed)
    assert float(loss) == pytest.approx(float(total) / count, abs=1e-5)
    jax.tree.map(
        lambda found, summed: np.testing.assert_allclose(found, summed / count, rtol=0, atol=1e-5),
        gradient,
        gradients,
    )
    assert float(steps.evaluate(params, packed)) == pytest.approx(float(loss), abs=1e-5)


def test_a_step_takes_packed_micro_batches(steps: CompiledSteps, batches: np.ndarray) -> None:
    state = initial_state(OWN, OWN_MODEL, steps)
    parts = [_packed(tokens) for tokens in batches[0]]
    expected = [float(steps.evaluate(state.params, part)) for part in parts]
    _, metrics = steps.train(state, Batch(*(np.stack(leaves) for leaves in zip(*parts, strict=True))))
    np.testing.assert_allclose(metrics.micro_losses, expected, rtol=0, atol=1e-5)


def test_padding_alone_gives_no_loss_and_no_gradient(steps: CompiledSteps) -> None:
    params = initial_state(OWN, OWN_MODEL, steps).params
    nothing = np.zeros((4, 16), np.uint16)
    batch = Batch(np.zeros((4, 17), np.uint16), nothing, nothing, nothing.astype(bool))
    loss, gradient = _packed_loss_and_gradient(params, batch)
    assert float(loss) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_step_is_compiled_once_and_consumes_its_state(
    steps: CompiledSteps, batches: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    given = jax.device_put(jax.device_get(initial_state(OWN, OWN_MODEL, steps).params))
    state = initial_state(OWN, OWN_MODEL, steps, given)
    old = state
    state, _ = steps.train(state, Batch(batches[0]))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for micro_batches in batches[1:]:
            state, _ = steps.train(state, Batch(micro_batches))
        jax.block_until_ready(state)
        assert "ompiling" not in caplog.text
        jax.jit(lambda x: x * 3)(jnp.ones(3))
        assert "ompiling" in caplog.text  # or the assertion above would say nothing
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_dropout_differs_by_micro_batch_and_step_and_is_repeatable() -> None:
    config = dataclasses.replace(
        OWN, bias=False, dropout=0.3, decay_lr=False, learning_rate=0.0, batch_size=2
    )
    model_config = config.model_config(29)
    compiled = _steps(config, model_config)
    tokens = np.broadcast_to(np.arange(17, dtype=np.uint16), (2, 2, 17))
    losses = []
    for _ in range(2):
        state = initial_state(config, model_config, compiled)
        for _ in range(2):
            state, metrics = compiled.train(state, Batch(tokens))
            losses.append(np.asarray(metrics.micro_losses))
    np.testing.assert_array_equal(losses[:2], losses[2:])
    assert len(np.unique(losses[:2])) == 4
    assert np.isfinite(losses).all()


def test_weights_of_linear_layers_decay_and_nothing_else() -> None:
    config = dataclasses.replace(OWN_MODEL, n_layer=2)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    mask = _names(decay_mask(shapes))
    linear = {
        f"h_{layer}/{name}/kernel"
        for layer in range(2)
        for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    }
    assert {name for name, decays in mask.items() if decays} == linear
    assert {name.rsplit("/", 1)[1] for name, decays in mask.items() if not decays} == {
        "embedding",
        "scale",
        "bias",
    }


def test_what_decays_is_what_decayed_in_the_published_run(golden: Path) -> None:
    settings = json.loads((golden / "train" / "settings.json").read_text())
    config = read_published(golden / "train" / "init_ckpt.pt").config
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    mask = _names(decay_mask(shapes))
    published = {
        name.replace("/", ".").replace("h_", "h.").rsplit(".", 1)[0]: decays for name, decays in mask.items()
    }
    for group, decays in (("decay", True), ("no_decay", False)):
        names = [name.removeprefix("transformer.").removesuffix(".weight") for name in settings[group]]
        assert all(published[name] is decays for name in names)


@pytest.mark.parametrize(
    "name",
    ["head/kernel", "h_0/attn/c_attn/scale", "h_0/cross/c_attn/kernel", "h_0/ln_3/scale", "my_wte/embedding"],
)
def test_an_unknown_parameter_is_refused(name: str) -> None:
    tree: Any = jnp.zeros((4, 4))
    for part in reversed(name.split("/")):
        tree = {part: tree}
    for rule in (parameter_specs, decay_mask):
        with pytest.raises(ValueError, match=f"{name} matches 0 rules"):
            rule(tree)


def test_the_rate_warms_up_falls_along_a_cosine_and_stays() -> None:
    config = dataclasses.replace(
        OWN, warmup_iters=100, lr_decay_iters=1100, learning_rate=1e-3, min_lr=1e-4, max_iters=2000
    )
    rate = learning_rate_schedule(config)
    quarter = 1e-4 + 0.9e-3 * 0.5 * (1 + math.cos(math.pi / 4))
    points = {0: 0, 1: 1e-5, 50: 5e-4, 100: 1e-3, 350: quarter, 600: 5.5e-4, 1100: 1e-4, 5000: 1e-4}
    for step, expected in points.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9), step


def test_the_rate_is_stable_until_the_last_steps_and_falls_to_nothing() -> None:
    config = dataclasses.replace(
        OWN, lr_schedule="wsd", warmup_iters=10, decay_iters=20, max_iters=100, learning_rate=1e-3, min_lr=0.0
    )
    rate = learning_rate_schedule(config)
    points = {0: 0, 5: 5e-4, 10: 1e-3, 79: 1e-3, 80: 1e-3, 85: 7.5e-4, 90: 5e-4, 99: 5e-5, 100: 0, 500: 0}
    for step, expected in points.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9), step
    endless = learning_rate_schedule(dataclasses.replace(config, decay_iters=0))
    assert float(endless(10)) == float(endless(10**6)) == pytest.approx(1e-3)
    to_a_tenth = learning_rate_schedule(dataclasses.replace(config, min_lr=1e-4, warmup_iters=0))
    assert float(to_a_tenth(0)) == pytest.approx(1e-3)
    assert float(to_a_tenth(90)) == pytest.approx(5.5e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_iters": 5}, "decay_iters=5 needs lr_schedule=wsd"),
        ({"lr_schedule": "wsd", "decay_iters": 8, "warmup_iters": 3, "max_iters": 10}, "max_iters=10"),
        ({"lr_schedule": "wsd", "decay_iters": -1}, "decay_iters=-1"),
    ],
)
def test_a_decay_that_has_no_place_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(OWN, **settings)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    rate = learning_rate_schedule(dataclasses.replace(OWN, warmup_iters=0))
    assert float(rate(0)) == pytest.approx(OWN.learning_rate)
    constant = learning_rate_schedule(dataclasses.replace(OWN, decay_lr=False))
    assert float(constant(0)) == float(constant(10**6)) == pytest.approx(OWN.learning_rate)


def test_clipping_scales_down_to_the_limit_and_never_up() -> None:
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    assert _norm(clip_by_norm(grads, jnp.array(5.0), 1.0)) == pytest.approx(1.0, rel=1e-6)
    for limit in (10.0, 0.0):
        jax.tree.map(np.testing.assert_array_equal, clip_by_norm(grads, jnp.array(5.0), limit), grads)


def test_dropout_is_drawn_by_the_generator_that_is_asked_for() -> None:
    config = dataclasses.replace(OWN, dropout=0.5)
    model_config = dataclasses.replace(OWN_MODEL, dropout=0.5)
    state = create_state(config, init_params(model_config, jax.random.key(0)))
    batch = Batch(np.zeros((1, 2, 9), np.uint16))
    losses = [
        float(jax.jit(partial(train_step, config, model_config, generator=generator))(state, batch)[1].loss)
        for generator in ("threefry2x32", "rbg", "rbg")
    ]
    assert losses[0] != losses[1] == losses[2]


def test_only_one_accelerator_draws_dropout_with_its_own_generator() -> None:
    def generator(platform: str, count: int) -> str:
        devices: Any = np.array([SimpleNamespace(platform=platform)] * count)
        mesh: Any = SimpleNamespace(devices=devices, size=count)
        return dropout_generator(mesh)

    found = [
        generator(platform, count) for platform, count in (("cpu", 1), ("gpu", 1), ("gpu", 2), ("tpu", 4))
    ]
    assert found == ["threefry2x32", "rbg", "threefry2x32", "threefry2x32"]
