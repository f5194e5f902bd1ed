"""Runs that move: with their moments out into published checkpoints and back, they go on where they stood."""

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.data.packing import Batch
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.models.kinds import read_training
from crystallm_jax.models.model import Model, Moments, Training
from crystallm_jax.models.published import (
    PUBLISHED_DEFAULTS,
    read_published,
    read_published_training,
    write_published,
)
from crystallm_jax.models.published_names import optimizer_order, parameter_table
from crystallm_jax.models.runs import read_run_training
from crystallm_jax.models.torch_file import read_torch_file
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.loop import run
from crystallm_jax.training.moments import moved_state
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import CompiledSteps, compile_steps, create_state, initial_state

STEP_TOLERANCE = 1e-4
# Of the moments after a few steps, against the largest of a parameter.
MOMENT_TOLERANCE = 1e-5
HALF, LATER = 30, 33

# Eleven layers: layer 10 is numbered before layer 2.
DEEP = ModelConfig(n_layer=11, n_head=2, n_embd=4, block_size=3, vocab_size=5, bias=True)
TINY = TrainConfig(
    eval_interval=100,
    checkpoint_interval=2,
    eval_iters_val=0,
    gradient_accumulation_steps=1,
    batch_size=2,
    block_size=8,
    n_layer=1,
    n_head=2,
    n_embd=8,
    learning_rate=1e-2,
    min_lr=1e-3,
    max_iters=4,
    lr_decay_iters=6,
    warmup_iters=1,
    dtype="float32",
)


def _random_weights(config: ModelConfig, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)

    def tree() -> Any:
        nested: dict[str, Any] = {}
        for entry in parameter_table(config).values():
            inner = nested
            for part in entry.path[:-1]:
                inner = inner.setdefault(part, {})
            inner[entry.path[-1]] = rng.uniform(0, 1, entry.held).astype(np.float32)
        return nested

    settings = {"learning_rate": 0.25, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.5, "windows": "packed"}
    return Model(config, tree(), Training(9, 1.25, settings, Moments(7, tree(), tree())))


def _assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _assert_same_training(found: Model, expected: Model) -> None:
    assert found.config == expected.config
    assert found.training is not None
    assert expected.training is not None
    _assert_equal(found.params, expected.params)
    ours, theirs = found.training.moments, expected.training.moments
    assert ours is not None
    assert theirs is not None
    assert (found.training.step, ours.updates) == (expected.training.step, theirs.updates)
    _assert_equal([ours.first, ours.second], [theirs.first, theirs.second])


def test_what_is_written_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    weights = _random_weights(DEEP)
    path = tmp_path / "ckpt.pt"
    write_published(path, weights)
    read = read_published_training(path)
    _assert_same_training(read, weights)
    assert read.training.best_val_loss == 1.25
    assert read.training.settings["beta1"] == 0.8
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    first = path.read_bytes()
    write_published(path, weights)
    assert path.read_bytes() == first


def test_the_written_file_has_the_published_form(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    weights = _random_weights(DEEP)
    write_published(path, weights)
    saved = read_torch_file(path)
    assert saved["model"]["lm_head.weight"] is not saved["model"]["transformer.wte.weight"]
    _assert_equal(saved["model"]["lm_head.weight"], weights.params["wte"]["embedding"])
    assert saved["model"]["transformer.h.3.mlp.c_fc.weight"].shape == (16, 4)
    assert saved["config"].keys() == PUBLISHED_DEFAULTS.keys()
    assert (saved["config"]["beta2"], saved["config"]["min_lr"], saved["config"]["n_layer"]) == (
        0.9,
        6e-5,
        11,
    )
    assert (saved["iter_num"], saved["best_val_loss"]) == (9, 1.25)
    decayed, others = saved["optimizer"]["param_groups"]
    assert decayed["params"] + others["params"] == list(range(2 + 12 * 11 + 2))
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.5, 0.0, (0.8, 0.9))
    order = optimizer_order(DEEP)
    tenth = order.decayed.index("transformer.h.10.attn.c_attn.weight")
    assert tenth < order.decayed.index("transformer.h.2.attn.c_attn.weight")
    moments = weights.training.moments
    kernel = moments.first["h_10"]["attn"]["c_attn"]["kernel"]
    entry = saved["optimizer"]["state"][tenth]
    np.testing.assert_array_equal(entry["exp_avg"], kernel.reshape(4, 12).T)
    assert entry["step"] == 7


def test_the_published_defaults_are_those_of_our_settings() -> None:
    ours = dataclasses.asdict(TrainConfig())
    # Ours does not evaluate on the training set unless asked.
    assert {name: ours[name] for name in PUBLISHED_DEFAULTS} == {**PUBLISHED_DEFAULTS, "eval_iters_train": 0}


def test_without_moments_a_fresh_optimiser_is_written(tmp_path: Path) -> None:
    weights = dataclasses.replace(_random_weights(DEEP), training=None)
    write_published(tmp_path / "ckpt.pt", weights)
    assert read_torch_file(tmp_path / "ckpt.pt")["optimizer"]["state"] == {}
    read = read_published_training(tmp_path / "ckpt.pt")
    assert read.training.moments is None
    assert (read.training.step, read.training.best_val_loss) == (0, None)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"ckpt\.pt: cannot be written"):
        write_published(tmp_path / "file" / "ckpt.pt", _random_weights(DEEP))
    (tmp_path / "ckpt.pt").mkdir()
    with pytest.raises(ModelError, match=r"ckpt\.pt: cannot be written"):
        write_published(tmp_path / "ckpt.pt", _random_weights(DEEP))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ckpt.pt", "file"]


def test_an_archive_keeps_the_moments_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYSTALLM_CACHE", str(tmp_path / "cache"))
    weights = _random_weights(DEEP)
    write_published(tmp_path / "ckpt.pt", weights)
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "ckpt.pt", "small/ckpt.pt")
    assert (
        read_training(tmp_path / "small.tar.gz").training.moments.updates == weights.training.moments.updates
    )


@pytest.mark.parametrize("rate", ["fast", None, float("nan"), 10**400])
def test_a_setting_of_the_optimiser_that_is_no_number_is_one_line(rate: Any, tmp_path: Path) -> None:
    weights = dataclasses.replace(_random_weights(DEEP), training=Training(1, None, {"learning_rate": rate}))
    with pytest.raises(ModelError, match=r"ckpt\.pt: learning_rate=.* is no number"):
        write_published(tmp_path / "ckpt.pt", weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model/a", "model/b", "model/c", "train/final", "train/init"])
def test_golden_checkpoints_come_out_as_they_went_in(name: str, golden: Path, tmp_path: Path) -> None:
    path = golden / (f"{name}_ckpt.pt" if name.startswith("train") else f"{name}/ckpt.pt")
    write_published(tmp_path / "ckpt.pt", read_published_training(path))
    ours, theirs = read_torch_file(tmp_path / "ckpt.pt"), read_torch_file(path)
    theirs["model"] = {
        key.removeprefix("_orig_mod."): value for key, value in sorted(theirs["model"].items())
    }
    ours["model"] = dict(sorted(ours["model"].items()))
    for part in ("model", "model_args", "config", "iter_num"):
        _assert_equal(ours[part], theirs[part])
    _assert_equal(ours["optimizer"]["state"], theirs["optimizer"]["state"])
    for found, expected in zip(
        ours["optimizer"]["param_groups"], theirs["optimizer"]["param_groups"], strict=True
    ):
        # The rate of the last step, which the published code sets before every step.
        assert {**found, "lr": None} == {**expected, "lr": None}


class Moved(NamedTuple):
    """A golden run that went half-way in one state, out into a file, and on in another."""

    file: Path
    losses: np.ndarray
    later: Moments
    end: Model


@pytest.fixture(scope="module")
def moved(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    start = read_published(golden / "train" / "init_ckpt.pt")
    settings = start.training.settings
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in settings.items() if name in known})
    compiled = _steps(config, start.config)
    state = initial_state(config, start.config, compiled, start.params)
    batches = np.load(golden / "train" / "batches.npz")["batches"]
    losses = []
    path = tmp_path_factory.mktemp("moved") / "ckpt.pt"
    stood = {}
    for number, micro_batches in enumerate(batches):
        if number in (HALF, LATER):
            stood[number] = _weights_of(state, start.config, settings)
        if number == HALF:
            write_published(path, stood[HALF])
            state = moved_state(config, compiled, read_published_training(path), place="here")
        state, metrics = compiled.train(state, Batch(micro_batches))
        losses.append(metrics.micro_losses)
    end = _weights_of(state, start.config, settings)
    return Moved(path, np.stack(jax.device_get(losses)), stood[LATER].training.moments, end)


def _assert_close(ours: Any, theirs: Any, tolerance: float, *, scaled: bool = True) -> None:
    """Within a tolerance, of each array's largest number if `scaled`."""

    def close(found: Any, expected: Any) -> None:
        scale = np.abs(expected).max() if scaled else 1.0
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)

    jax.tree.map(close, ours, theirs)


def _steps(config: TrainConfig, model_config: ModelConfig) -> CompiledSteps:
    return compile_steps(config, model_config, make_mesh(1, 1, jax.devices()[:1]))


def _weights_of(state: Any, config: ModelConfig, settings: dict[str, Any]) -> Model:
    state = jax.device_get(state)
    adam = state.opt_state[0]
    moments = Moments(int(adam.count), adam.mu, adam.nu)
    return Model(config, state.params, Training(int(state.step), None, settings, moments))


def test_a_run_that_moved_through_a_file_gives_the_published_losses_and_moments(
    moved: Moved, golden: Path
) -> None:
    recorded = np.load(golden / "train" / "trajectory.npz")["losses"]
    np.testing.assert_allclose(moved.losses, recorded, rtol=0, atol=STEP_TOLERANCE)
    expected = read_published_training(golden / "train" / "final_ckpt.pt")
    ours, theirs = moved.end.training, expected.training
    assert ours.step == theirs.step == ours.moments.updates == theirs.moments.updates == 60
    _assert_close(moved.end.params, expected.params, STEP_TOLERANCE, scaled=False)
    # As far as the parameters have drifted apart in 60 steps, by rounding.
    _assert_close(ours.moments.first, theirs.moments.first, STEP_TOLERANCE)
    _assert_close(ours.moments.second, theirs.moments.second, STEP_TOLERANCE)


def _go_on_in_torch(saved: dict[str, Any], batches: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The published step in PyTorch, gradients summed and clipped: losses of micro-batches; `saved` moves on."""
    import torch
    from torch.nn import functional

    heads, layers = saved["model_args"]["n_head"], saved["model_args"]["n_layer"]
    params = {
        name.removeprefix("transformer."): torch.nn.Parameter(value)
        for name, value in saved["model"].items()
        if name != "lm_head.weight"
    }

    def loss_of(tokens: Any) -> Any:
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        x = params["wte.weight"][given] + params["wpe.weight"][: given.shape[1]]

        def normed(x: Any, name: str) -> Any:
            return functional.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], None, 1e-5)

        for layer in range(layers):
            name = f"h.{layer}"
            parts = (normed(x, f"{name}.ln_1") @ params[f"{name}.attn.c_attn.weight"].T).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.transpose(1, 2).flatten(2) @ params[f"{name}.attn.c_proj.weight"].T
            hidden = normed(x, f"{name}.ln_2") @ params[f"{name}.mlp.c_fc.weight"].T
            hidden = functional.gelu(hidden, approximate="tanh")
            x = x + hidden @ params[f"{name}.mlp.c_proj.weight"].T
        logits = normed(x, "ln_f") @ params["wte.weight"].T
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    decayed = sorted(name for name in params if name.startswith("h.") and ".ln_" not in name)
    groups = [decayed, sorted(params.keys() - set(decayed))]
    optimizer = torch.optim.AdamW(
        [{"params": [params[name] for name in names], "weight_decay": 0.1} for names in groups]
    )
    optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for micro_batches, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        found = [loss_of(torch.from_numpy(tokens.astype(np.int64))) for tokens in micro_batches]
        optimizer.zero_grad()
        sum(found).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        losses.append([loss.item() for loss in found])
    saved["optimizer"] = optimizer.state_dict()
    return np.array(losses)


def test_pytorch_goes_on_from_what_is_written(moved: Moved, golden: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    saved = torch.load(moved.file, weights_only=True)
    assert torch.load(moved.file, weights_only=False).keys() == saved.keys()
    model = saved["model"]
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()
    steps = slice(HALF, LATER)
    batches = np.load(golden / "train" / "batches.npz")["batches"][steps]
    recorded = np.load(golden / "train" / "trajectory.npz")
    found = _go_on_in_torch(saved, batches, recorded["lr"][steps])
    np.testing.assert_allclose(found, recorded["losses"][steps], rtol=0, atol=STEP_TOLERANCE)
    # And back: what PyTorch saves now is where our run stood then.
    torch.save(saved, tmp_path / "ckpt.pt")
    moments = read_published_training(tmp_path / "ckpt.pt").training.moments
    assert moments.updates == moved.later.updates == LATER
    _assert_close(moved.later.first, moments.first, MOMENT_TOLERANCE)
    _assert_close(moved.later.second, moments.second, MOMENT_TOLERANCE)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    with StoreWriter(folder) as out:
        for number in range(8):
            out.add(str(number), rng.integers(0, 371, 40).astype(np.uint16), split="train")
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours, with a checkpoint half-way."""
    out_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(dataclasses.replace(TINY, dataset=str(dataset), out_dir=str(out_dir)))
    return out_dir


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_a_run_goes_on_in_another_folder_where_the_first_stood(
    whole: Path, dataset: Path, tmp_path: Path
) -> None:
    weights = read_run_training(whole / "checkpoints" / "2")
    write_published(tmp_path / "ckpt.pt", weights)
    _assert_same_training(read_training(tmp_path / "ckpt.pt"), weights)
    _assert_same_training(read_training(whole / "checkpoints" / "2"), weights)
    config = dataclasses.replace(
        TINY,
        dataset=str(dataset),
        out_dir=str(tmp_path / "on"),
        init_from=str(tmp_path / "ckpt.pt"),
        init_state="all",
        layers="scanned",
        ema_decay=0.5,
    )
    assert run(config).step == 4
    expected = {step: loss for step, loss in _losses(whole).items() if step > 2}
    assert _losses(tmp_path / "on") == pytest.approx(expected, abs=1e-5)
    # It is a run like others: with a checkpoint of its own, from which it resumes.
    resumed = dataclasses.replace(config, init_from="resume", eval_only=True)
    assert run(resumed).step == 4
    again = read_run_training(tmp_path / "on")
    ends = read_run_training(whole)
    assert again.training.step == ends.training.step == 4
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5),
        [again.params, again.training.moments.first, again.training.moments.second],
        [ends.params, ends.training.moments.first, ends.training.moments.second],
    )


# A run without an end, its decay to be branched off.
STABLE = dataclasses.replace(
    TINY, optimizer="muon", ema_decay=0.5, lr_schedule="wsd", dropout=0.1, min_lr=0.0, max_iters=6
)


@pytest.fixture(scope="module")
def stable(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("runs") / "stable"
    run(dataclasses.replace(STABLE, dataset=str(dataset), out_dir=str(out_dir)))
    return out_dir


def _final_state(folder: Path) -> Any:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.read(lambda names: True).arrays


def test_a_decay_is_branched_off_any_checkpoint_bit_for_bit(
    stable: Path, dataset: Path, tmp_path: Path
) -> None:
    decaying = dataclasses.replace(STABLE, dataset=str(dataset), decay_iters=2)
    run(dataclasses.replace(decaying, out_dir=str(tmp_path / "straight")))
    branch = dataclasses.replace(
        decaying,
        out_dir=str(tmp_path / "branch"),
        init_from=str(stable / "checkpoints" / "4"),
        init_state="all",
    )
    assert run(branch).step == 6
    straight, branched = _losses(tmp_path / "straight"), _losses(tmp_path / "branch")
    assert branched == {step: loss for step, loss in straight.items() if step > 4}
    assert {step: loss for step, loss in straight.items() if step <= 4}.items() <= _losses(stable).items()
    _assert_equal(_final_state(tmp_path / "branch"), _final_state(tmp_path / "straight"))
    # Its parent is as it was, and the branch is a run of its own.
    assert max(_losses(stable)) == 6
    assert run(dataclasses.replace(branch, existing_run="resume", max_iters=8, decay_iters=4)).step == 8


def test_a_branch_with_no_step_to_take_or_another_state_is_refused(
    stable: Path, dataset: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        STABLE,
        dataset=str(dataset),
        out_dir=str(tmp_path / "branch"),
        init_from=str(stable),
        init_state="all",
    )
    with pytest.raises(ConfigError, match="stood at step 6, and max_iters=6 is none more"):
        run(config)
    for changed in ({"layers": "scanned"}, {"ema_decay": 0.0}, {"n_embd": 16}, {"optimizer": "adamw"}):
        with pytest.raises(ModelError, match=f"stable: .*{next(iter(changed))}="):
            run(dataclasses.replace(config, max_iters=8, **changed))


def test_what_has_no_moments_is_refused_for_going_on(dataset: Path, tmp_path: Path) -> None:
    weights = dataclasses.replace(_random_weights(TINY.model_config(371)), training=None)
    write_published(tmp_path / "ckpt.pt", weights)
    asked = dataclasses.replace(
        TINY,
        dataset=str(dataset),
        out_dir=str(tmp_path / "on"),
        init_from=str(tmp_path / "ckpt.pt"),
        init_state="all",
    )
    with pytest.raises(ModelError, match=r"ckpt\.pt: keeps no moments .* init_state=weights"):
        run(asked)
    with pytest.raises(ModelError, match="needs optimizer=adamw"):
        run(dataclasses.replace(asked, optimizer="muon"))
    with pytest.raises(ConfigError, match="init_from=PATH"):
        TrainConfig(init_state="all")


def _checkpoint(folder: Path, config: TrainConfig) -> Any:
    """A run folder with a checkpoint of step 5, whose average is not its parameters."""
    model_config = config.model_config(11)
    params = jax.tree.map(jnp.asarray, _random_weights(model_config).params)
    state = create_state(config, params)
    average = None if state.ema is None else jax.tree.map(lambda leaf: leaf + 1, params)
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        described = {"model": dataclasses.asdict(model_config), "train": dataclasses.asdict(config)}
        checkpoints.save(
            dataclasses.replace(state, ema=average),
            step=5,
            data_state={},
            description=described | {"patience": {"best": 1.5}},
            val_loss=None,
        )
    return jax.device_get(params)


def test_a_run_with_an_average_trains_on_from_its_parameters(tmp_path: Path) -> None:
    params = _checkpoint(tmp_path, dataclasses.replace(TINY, ema_decay=0.5))
    found = read_training(tmp_path)
    _assert_equal(found.params, params)
    assert (found.training.step, found.training.best_val_loss) == (5, 1.5)
    assert found.training.settings["learning_rate"] == 1e-2


def test_the_state_of_muon_stays_in_its_run(tmp_path: Path) -> None:
    _checkpoint(tmp_path, dataclasses.replace(TINY, optimizer="muon"))
    with pytest.raises(ModelError, match=r"optimizer=muon.*init_state=weights"):
        read_training(tmp_path)
