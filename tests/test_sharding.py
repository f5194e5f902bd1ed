"""Sharding: what is split over which devices, and that it changes no number."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from crystallm_jax.errors import ConfigError
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.kinds import WriteSettings, Written, read_model, write_model
from crystallm_jax.models.parameters import flattened
from crystallm_jax.training.sharding import FSDP, make_mesh, parameter_specs, state_shardings

ROOT = Path(__file__).parents[1]
MESH_TOLERANCE = 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_has_one_sharding_and_kernels_alone_are_split(bias: bool) -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=29, bias=bias)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    specs = jax.tree_util.tree_flatten_with_path(
        parameter_specs(shapes), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )[0]
    assert len(specs) == len(jax.tree.leaves(shapes))
    for path, spec in specs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (FSDP in spec) == name.endswith("kernel"), name


def test_a_mesh_that_is_not_the_devices_is_refused() -> None:
    devices = jax.devices()[:1]
    with pytest.raises(ConfigError, match="fsdp=2 does not divide the 1 devices"):
        make_mesh(-1, 2, devices)
    with pytest.raises(ConfigError, match="fsdp=0"):
        make_mesh(-1, 0, devices)
    with pytest.raises(
        ConfigError, match="data_parallel=2 × fsdp=1 × tensor=1 is not the number of devices, 1"
    ):
        make_mesh(2, 1, devices)


class _Chip:
    """What a mesh asks of a TPU."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v4", 0, 0

    def __init__(self, number: int, slice_index: int) -> None:
        self.id = number
        self.slice_index = slice_index
        self.coords = (number % 2, number // 2, 0)


def test_only_the_data_axis_runs_between_tpu_slices() -> None:
    chips: list[Any] = [_Chip(number, index) for number in range(4) for index in range(2)]
    mesh = make_mesh(-1, 2, chips, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match="fsdp=8 × tensor=1 does not divide the 4 devices of each of the 2"):
        make_mesh(-1, 8, chips)


_EIGHT_DEVICES = """
import dataclasses, json, pathlib, sys
import jax, numpy as np
from crystallm_jax.models.parameters import flattened
from crystallm_jax.data.packing import Batch
from crystallm_jax.errors import ConfigError
from crystallm_jax.model.stacking import unstacked
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps, initial_state

config = TrainConfig(
    gradient_accumulation_steps=2, batch_size=8, block_size=16, n_layer=1, n_head=2, n_embd=32, learning_rate=1e-2,
    min_lr=1e-3, warmup_iters=1, lr_decay_iters=8, dtype="float32",
)
model_config = config.model_config(29)
batches = np.random.default_rng(0).integers(0, 29, (3, 2, 8, 17)).astype(np.uint16)
report = {"devices": jax.device_count()}
for name, data, fsdp, tensor, layers in (
    ("1", 1, 1, 1, "unrolled"),
    ("dp 8", 8, 1, 1, "unrolled"),
    ("fsdp 8", 1, 8, 1, "unrolled"),
    ("2 x 4", 2, 4, 1, "unrolled"),
    ("2 x 2 x 2", 2, 2, 2, "unrolled"),
    ("2 x 2 x 2 scanned", 2, 2, 2, "scanned"),
):
    config = dataclasses.replace(config, layers=layers)
    model_config = config.model_config(29)
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp * tensor], tensor=tensor)
    steps = compile_steps(config, model_config, mesh)
    state = initial_state(config, model_config, steps)
    losses = []
    for tokens in batches:
        state, metrics = steps.train(state, jax.device_put(Batch(tokens), steps.micro_batches))
        losses.append([*np.asarray(metrics.micro_losses).tolist(), float(metrics.grad_norm)])
    losses.append([float(steps.evaluate(state.params, jax.device_put(Batch(batches[0, 0]), steps.batch)))] * 3)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.addressable_shards[0].data.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if ("h_0" in str(path) or "'h'" in str(path)) and "kernel" in str(path)
    }
    report[name] = {"losses": losses, "shards": kernels}
# The last, split over all three axes, is saved as a run saves it.
run = pathlib.Path(sys.argv[1])
with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
    described = {"vocab_size": 29, "model": dataclasses.asdict(model_config)}
    checkpoints.save(state, step=3, data_state={}, description=described, val_loss=None)
np.savez(run / "expected.npz", **flattened(unstacked(jax.device_get(state.params))))
for name, changes, fsdp, tensor in (
    ("batch", {"batch_size": 12}, 1, 1),
    ("width", {"n_embd": 36}, 8, 1),
    ("heads", {"n_head": 2}, 1, 4),
):
    changed = dataclasses.replace(config, **changes)
    try:
        compile_steps(changed, changed.model_config(29), make_mesh(-1, fsdp, tensor=tensor))
    except ConfigError as error:
        report[name] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eight_devices")


@pytest.fixture(scope="module")
def eight_devices(saved_run: Path) -> dict[str, Any]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT_DEVICES, str(saved_run)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", ["dp 8", "fsdp 8", "2 x 4", "2 x 2 x 2", "2 x 2 x 2 scanned"])
def test_every_mesh_gives_the_losses_of_one_device(mesh: str, eight_devices: dict[str, Any]) -> None:
    assert eight_devices["devices"] == 8
    np.testing.assert_allclose(
        eight_devices[mesh]["losses"], eight_devices["1"]["losses"], rtol=0, atol=MESH_TOLERANCE
    )
    assert np.isfinite(eight_devices["1"]["losses"]).all()


@pytest.mark.parametrize("kind", ["folder", "published", "numpy"])
def test_what_eight_devices_trained_is_exported_and_loaded_on_one(
    kind: Written, eight_devices: dict[str, Any], saved_run: Path, tmp_path: Path
) -> None:
    assert jax.device_count() == 1
    target = tmp_path / "model"
    write_model(target, read_model(saved_run), kind=kind, settings=WriteSettings(ModelCard()))
    with np.load(saved_run / "expected.npz") as expected:
        found = flattened(read_model(target).params)
        assert found.keys() == set(expected)
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(("mesh", "parts"), [("dp 8", 1), ("fsdp 8", 8), ("2 x 4", 4)])
def test_kernels_and_their_moments_are_really_split(
    mesh: str, parts: int, eight_devices: dict[str, Any]
) -> None:
    shards = eight_devices[mesh]["shards"]
    whole = {
        "attn/c_attn": [32 // parts, 3, 32],
        "attn/c_proj": [32, 32 // parts],
        "mlp/c_fc": [32 // parts, 128],
        "mlp/c_proj": [128, 32 // parts],
    }
    for kernel, shape in whole.items():
        found = [shard for name, shard in shards.items() if f"h_0/{kernel}/kernel" in name]
        # The parameter and its two moments.
        assert found == [shape] * 3


@pytest.mark.parametrize(("mesh", "layers"), [("2 x 2 x 2", []), ("2 x 2 x 2 scanned", [1])])
def test_a_tensor_axis_splits_heads_and_hidden_units(
    mesh: str, layers: list[int], eight_devices: dict[str, Any]
) -> None:
    shards = eight_devices[mesh]["shards"]
    for kernel, shape in {
        "attn/c_attn": [16, 3, 16],
        "attn/c_proj": [16, 16],
        "mlp/c_fc": [16, 64],
        "mlp/c_proj": [64, 16],
    }.items():
        found = [shard for name, shard in shards.items() if f"/{kernel}/kernel" in name]
        assert found == [[*layers, *shape]] * 3


def test_what_does_not_divide_over_the_mesh_is_refused(eight_devices: dict[str, Any]) -> None:
    assert "batch_size=12 is not a multiple of the 8 devices" in eight_devices["batch"]
    assert "fsdp=8 does not divide the 36" in eight_devices["width"]
    assert "tensor=4 does not divide the 2 heads" in eight_devices["heads"]


def test_on_one_device_everything_is_whole() -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=29)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shardings = state_shardings({"params": shapes}, make_mesh(1, 1, jax.devices()[:1]))
    assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(shapes))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
