"""The optimisers: which parameters decay, and Muon for the kernels whatever their layout and sharding."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crystallm_jax.config import load_config
from crystallm_jax.errors import ConfigError
from crystallm_jax.model import init_params
from crystallm_jax.model.stacking import stacked, unstacked
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.optimizer import MATRIX_RULES, MUON_RMS, decay_mask, make_optimizer
from crystallm_jax.training.sharding import make_mesh, path_name
from crystallm_jax.training.step import compile_steps, initial_state

CONFIG = TrainConfig(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    bias=True,
    optimizer="muon",
    learning_rate=0.1,
    weight_decay=0.0,
    decay_lr=False,
)
VOCAB_SIZE = 11


def _named(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return init_params(CONFIG.model_config(VOCAB_SIZE), jax.random.key(0))


@pytest.fixture(scope="module")
def grads(params: dict[str, Any]) -> dict[str, Any]:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True))


def _updates(config: TrainConfig, params: Any, grads: Any, *, steps: int = 1) -> Any:
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return updates


def _stacked(tree: dict[str, Any]) -> dict[str, Any]:
    return stacked(tree, CONFIG.n_layer)


def test_stacked_layers_decay_like_those_of_their_own(params: dict[str, Any]) -> None:
    decaying = {name for name, decays in _named(decay_mask(params)).items() if decays}
    assert len(decaying) == 4 * CONFIG.n_layer
    assert {name for name, decays in _named(decay_mask(_stacked(params))).items() if decays} == {
        name.replace("h_0/", "h/") for name in decaying if name.startswith("h_0/")
    }


def test_every_kernel_has_axes_and_nothing_else_does(params: dict[str, Any]) -> None:
    for tree in (params, _stacked(params)):
        for name in _named(tree):
            matches = [pattern for pattern, _ in MATRIX_RULES if re.fullmatch(pattern, name)]
            assert len(matches) == name.endswith("kernel"), name


def _matrices_of(updates: dict[str, Any]) -> list[np.ndarray]:
    """Every matrix that was moved, three of them in `c_attn`."""
    found = []
    for name, leaf in _named(updates).items():
        if name.endswith("c_attn/kernel"):
            found += [np.asarray(leaf)[:, i] for i in range(3)]
        elif name.endswith("kernel"):
            found.append(np.asarray(leaf))
    return found


def test_muon_makes_each_matrix_nearly_orthogonal_with_an_rms_like_adamw(
    params: dict[str, Any], grads: dict[str, Any]
) -> None:
    moved = _matrices_of(_updates(CONFIG, params, grads))
    assert len(moved) == 6 * CONFIG.n_layer
    for matrix in moved:
        scaled = matrix / (CONFIG.learning_rate * MUON_RMS * np.sqrt(max(matrix.shape)))
        values = np.linalg.svd(scaled, compute_uv=False)
        # The iteration's fixed coefficients leave singular values around 1, not at it.
        assert 0.3 < values.min() <= values.max() < 1.4
        rms = np.sqrt(np.mean(matrix**2)) / CONFIG.learning_rate
        assert 0.5 * MUON_RMS < rms < 1.4 * MUON_RMS


def test_muon_leaves_the_rest_to_adam(params: dict[str, Any], grads: dict[str, Any]) -> None:
    muon = _named(_updates(CONFIG, params, grads))
    adam = _named(_updates(dataclasses.replace(CONFIG, optimizer="adamw"), params, grads))
    for name in muon:
        close = np.allclose(muon[name], adam[name], rtol=1e-4)
        assert close != name.endswith("kernel"), name


def test_muon_is_the_same_for_stacked_layers(params: dict[str, Any], grads: dict[str, Any]) -> None:
    alone = _named(_updates(CONFIG, params, grads, steps=3))
    together = _named(unstacked(_updates(CONFIG, _stacked(params), _stacked(grads), steps=3)))
    assert alone.keys() == together.keys()
    for name, update in alone.items():
        np.testing.assert_allclose(together[name], update, rtol=1e-4, atol=1e-6, err_msg=name)


def test_decay_shrinks_what_muon_moves_and_nothing_else(
    params: dict[str, Any], grads: dict[str, Any]
) -> None:
    plain = _named(_updates(CONFIG, params, grads))
    decayed = _named(_updates(dataclasses.replace(CONFIG, weight_decay=0.1), params, grads))
    for name, start in _named(params).items():
        wanted = 0.1 * CONFIG.learning_rate * start if name.endswith("kernel") else jnp.zeros_like(start)
        np.testing.assert_allclose(plain[name] - decayed[name], wanted, atol=1e-6, err_msg=name)


def test_an_optimizer_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        load_config(TrainConfig, None, ["optimizer=sgd"])


_FOUR_DEVICES = """
import json
import jax, numpy as np
from crystallm_jax.model import init_params
from crystallm_jax.model.stacking import stacked
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import make_optimizer
from crystallm_jax.training.sharding import make_mesh, state_shardings

config = TrainConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, optimizer="muon", decay_lr=False)
params = stacked(init_params(config.model_config(11), jax.random.key(0)), 2)
grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
optimizer = make_optimizer(config)
report = {}
for name, data, fsdp, tensor, count in (("1", 1, 1, 1, 1), ("4", 1, 2, 2, 4)):
    state = {"params": params, "grads": grads, "opt_state": optimizer.init(params)}
    shardings = state_shardings(state, make_mesh(data, fsdp, jax.devices()[:count], tensor=tensor))
    placed = jax.device_put(state, shardings)
    updates, opt_state = jax.jit(optimizer.update)(placed["grads"], placed["opt_state"], placed["params"])
    report[name] = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(updates)]
    moments = jax.tree.leaves(placed["opt_state"])
    report[f"split {name}"] = sum(not leaf.sharding.is_fully_replicated for leaf in moments)
print(json.dumps(report))
"""


def test_muon_is_the_same_for_sharded_kernels() -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", _FOUR_DEVICES],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["split 4"] == 4  # the momentum of each kernel
    for alone, split in zip(report["1"], report["4"], strict=True):
        np.testing.assert_allclose(split, alone, rtol=1e-3, atol=1e-7)


def test_the_state_of_muon_is_kept_in_checkpoints(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, layers="scanned", batch_size=1)
    model_config = config.model_config(VOCAB_SIZE)
    steps = compile_steps(config, model_config, make_mesh(1, 1, jax.devices()[:1]))
    state = jax.tree.map(lambda leaf: leaf + 1, initial_state(config, model_config, steps))
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(state, step=1, data_state={}, description={}, val_loss=None)
        checkpoints.wait()
        restored = checkpoints.restore(steps.abstract).state
    assert _named(restored).keys() == _named(state).keys()
    for name, leaf in _named(state).items():
        np.testing.assert_array_equal(_named(restored)[name], leaf, err_msg=name)
