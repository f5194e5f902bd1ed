"""The call on a bare machine: packed, checked, trained until killed and gone on with, and joined to a model."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.config import find_config, load_config
from crystallm_jax.data.packing import Batch
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.rows import open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.model import ModelConfig, count_params, init_params
from crystallm_jax.model.stacking import stacked
from crystallm_jax.models import Model
from crystallm_jax.models.model_folder import read_folder
from crystallm_jax.models.parameters import flattened
from crystallm_jax.models.published import write_published
from crystallm_jax.numpy_model import NumpyModel
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import learning_rate_schedule
from crystallm_jax.training.step import create_state

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
BLOCK = 64
TINY = (
    f"block_size={BLOCK}",
    "n_layer=2",
    "n_head=2",
    "n_embd=16",
    "batch_size=2",
    "dtype=float32",
    "warmup_iters=5",
)
# What ends no run by itself.
ENDLESS = ("--until", "100000", "--max-steps", "1000000")
PATIENCE_S = 200

_BARE = """
import importlib.abc, runpy, sys

ABSENT = {"grain", "omegaconf", "pymatgen", "spglib", "safetensors", "pandas", "scipy", "ase", "pebble", "tqdm"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _random_params(config: ModelConfig) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def _tool(name: str) -> ModuleType:
    return importlib.import_module(f"accelerator_{name}")


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "made_up"
    data_id = CIFTokenizer().token_to_id["data_"]
    rng = np.random.default_rng(0)
    with StoreWriter(folder) as out:
        for split, records in (("train", 150), ("val", 9)):
            for i in range(records):
                tokens = np.concatenate([[data_id], rng.integers(0, data_id, rng.integers(8, 40))])
                out.add(f"{split}{i}", tokens, split=split)
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden files as the published code's are, recorded from the package's own NumPy model."""
    folder = tmp_path_factory.mktemp("recorded")
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    params = _random_params(config)
    tokens = np.random.default_rng(0).integers(0, 371, (2, 16))
    model = NumpyModel(config, params)
    for name in "abc":
        (folder / "model" / name).mkdir(parents=True)
        write_published(folder / "model" / name / "ckpt.pt", Model(config, params))
        np.savez(folder / "model" / name / "logits.npz", input_ids=tokens, logits=model.logits(tokens))
    greedy = [3, 1, 4]
    while len(greedy) < 20:
        greedy.append(int(model.logits(np.array([greedy[-16:]]))[0, -1].argmax()))
    np.savez(folder / "sampling.npz", prompt_ids=np.array(greedy[:3]), greedy_ids=np.array(greedy))
    return folder


@pytest.fixture(scope="module")
def shipment(dataset: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shipment"
    assert _main("pack", "--dataset", dataset, "--golden", recorded, "--out", out, *TINY) == 0
    return out


def _main(*arguments: object) -> int:
    return int(_tool("run").main([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes keep what they compile, for those after them."""
    return tmp_path_factory.mktemp("compiled")


def _bare(compiled: Path, *arguments: object) -> subprocess.Popen[str]:
    """The tool in a process where little can be imported."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-c", _BARE, str(TOOLS / "accelerator_run.py"), *map(str, arguments)],
        cwd=ROOT,
        env=environment
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            # Little is computed, so that most of the time would go into making it fast.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finished(process: subprocess.Popen[str]) -> str:
    printed, complaints = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, complaints
    return printed


def _report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_bytes()))


def _has_weights(out: Path) -> bool:
    return (out / "report.json").is_file() and "weights" in _report(out)


def _checkpoints(work: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(path.name) for path in (work / "checkpoints").glob("*") if path.name.isdecimal()]


def _params(folder: Path) -> dict[str, np.ndarray]:
    return flattened(_tool("parts").read_parts(folder).weights.params)


@pytest.mark.timeout(600)
def _recipe_rate() -> float:
    return load_config(TrainConfig, find_config("default")).learning_rate


def test_killed_in_the_middle_resumed_and_gone_on_with_from_what_came_back(
    shipment: Path, compiled: Path, tmp_path: Path
) -> None:
    common = ("run", "--shipment", shipment)
    out, work = tmp_path / "out", tmp_path / "work"
    process = _bare(
        tmp_path / "compiled", *common, *ENDLESS, "--out", out, "--work", work, "--save-every", 0.3
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (_has_weights(out) and _checkpoints(work)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    _, complaints = process.communicate()
    assert process.returncode == -signal.SIGKILL, complaints
    checks = _report(out)["checks"]
    assert checks["golden"]["passed"] is True
    assert checks["golden"]["greedy"] == {"tokens": 20, "equal": 20}
    assert checks["attention"]["passed"] is None
    # What came back before the kill is a model already.
    assert _params(out)["wte.embedding"].shape == (371, 16)

    stood = max(_checkpoints(work))
    last = 2 * stood + 10
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    quiet = (*common, "--until", "100000", "--save-every", "100000", "--only", "training", "--max-steps")
    # The second is the same run without the kill.
    processes = [
        _bare(compiled, *quiet, last, "--out", resumed, "--work", work),
        _bare(compiled, *quiet, last, "--out", whole, "--work", tmp_path / "other"),
    ]
    for process in processes:
        _finished(process)
    training = _report(resumed)["training"]
    assert (training["started_from"], training["first_step"], training["step"]) == ("checkpoint", stood, last)
    assert (training["rows_read"], training["decay"], training["ended"]) == (2 * last, 1.0, "end")
    assert _report(whole)["training"]["started_from"] == "scratch"
    found, expected = _params(resumed), _params(whole)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    lines = {line["step"]: line for line in _tool("parts").read_metrics(resumed) if "lr" in line}
    assert lines[last]["lr"] < lines[10]["lr"] == pytest.approx(_recipe_rate())
    assert lines[last]["update_norm"] < 0.8 * lines[10]["update_norm"]
    assert sorted(path.name for path in resumed.iterdir()) == [
        "metrics.jsonl.gz",
        "report.json",
        "weights-0.npz",
    ]

    later = tmp_path / "later"
    back = ("--resume-from", resumed, "--out", later, "--work", tmp_path / "third")
    _finished(_bare(compiled, *quiet, last + 20, *back))
    training = _report(later)["training"]
    assert (training["started_from"], training["first_step"]) == ("parts", last)
    assert (training["step"], training["rows_read"]) == (last + 20, 2 * last + 40)

    model = tmp_path / "model"
    assert _main("join", resumed, "--out", model) == 0
    joined = flattened(read_folder(model).params)
    for name, value in found.items():
        np.testing.assert_array_equal(value, joined[name], err_msg=name)


def test_sigterm_saves(shipment: Path, compiled: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    ran = ("run", "--shipment", shipment, *ENDLESS, "--only", "training", "--save-every", 0.1)
    process = _bare(compiled, *ran, "--out", out, "--work", work)
    deadline = time.monotonic() + PATIENCE_S
    while not _has_weights(out) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, complaints = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, complaints
    training = _report(out)["training"]
    assert (training["ended"], training["decay"]) == ("signal", 0.0)
    assert training["step"] in _checkpoints(work)


def test_a_check_that_fails_is_recorded_and_tells_in_the_exit_code(
    shipment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, out = tmp_path / "shipment", tmp_path / "out"
    shutil.copytree(shipment, packed)
    logits = packed / "golden" / "model" / "b" / "logits.npz"
    with np.load(logits) as saved:
        changed = {"input_ids": saved["input_ids"], "logits": saved["logits"] + 1e-3}
    np.savez(logits, **changed)
    ran = ("--out", out, "--work", tmp_path / "work", "--until", 100000, "--only", "checks")
    assert _main("run", "--shipment", packed, *ran) == 1
    assert "failed: golden" in capsys.readouterr().err
    differences = _report(out)["checks"]["golden"]["greatest_difference"]
    assert differences["a"] < 1e-5 < differences["b"]
    # One that breaks is one that failed.
    (packed / "golden" / "model" / "a" / "ckpt.pt").write_bytes(b"nothing")
    checks = _tool("checks").run_checks(_tool("shipment").open_shipment(packed, tmp_path / "work"))
    assert _tool("checks").failed(checks) == ["golden"]
    assert "ckpt.pt" in checks["golden"]["reason"]


def test_a_shipment_holds_the_tokens_as_they_are(dataset: Path, shipment: Path, tmp_path: Path) -> None:
    opened = _tool("shipment").open_shipment(shipment, tmp_path)
    for split, store in (("train", opened.store), ("val", opened.val_store)):
        original = TokenStore.open(dataset, split)
        np.testing.assert_array_equal(store.tokens, original.tokens)
        np.testing.assert_array_equal(store.starts, original.starts)
    assert (opened.dataset, opened.config.n_embd, opened.config.optimizer) == ("made_up", 16, "muon")


def test_tokens_that_are_packed_are_left_and_golden_files_go_with_the_last_call(
    dataset: Path, recorded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shipment"
    assert _main("pack", "--dataset", dataset, "--golden", recorded, "--out", out) == 0
    before = (out / "train.tokens.xz").stat().st_mtime_ns
    assert _main("pack", "--dataset", dataset, "--out", out, "learning_rate=1e-3") == 0
    assert (out / "train.tokens.xz").stat().st_mtime_ns == before
    assert not (out / "golden").exists()
    opened = _tool("shipment").open_shipment(out, tmp_path / "work")
    assert opened.golden is None
    config = opened.config
    assert (config.learning_rate, config.n_layer, config.n_embd, config.windows) == (1e-3, 8, 512, "packed")
    shapes = jax.eval_shape(
        lambda: init_params(config.model_config(opened.store.header.vocab_size), jax.random.key(0))
    )
    assert count_params(shapes) == 25_888_768
    _tool("parts").check_size(count_params(shapes))
    with pytest.raises(ConfigError, match="can come back"):
        _tool("parts").check_size(203_837_440)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (
            ("run", "--shipment", "{tmp}/none", "--out", "{tmp}/out", "--until", "100000"),
            1,
            "no shipment there",
        ),
        (
            ("run", "--shipment", "{shipment}", "--out", "{tmp}/out", "--until", "15"),
            2,
            "none is left to train",
        ),
        (
            ("run", "--shipment", "{shipment}", "--out", "{tmp}", "--until", "99999", "--decay-share", "2"),
            2,
            "--decay-share 2",
        ),
        (("run", "--shipment", "{shipment}", "--until", "100000"), 2, "give --out DIR"),
        (
            (
                "run",
                "--shipment",
                "{shipment}",
                "--out",
                "{tmp}",
                "--until",
                "99999",
                "--resume-from",
                "{tmp}/no",
            ),
            1,
            "no report.json there",
        ),
        (("pack", "--dataset", "{data}", "--golden", "{tmp}", "--out", "{tmp}/s"), 1, "no such golden file"),
        (("pack", "--dataset", "{tmp}/none", "--out", "{tmp}/s"), 1, "no prepared folder"),
        (("pack", "--dataset", "{data}", "--out", "{tmp}/s", "max_iters=9"), 2, "the time that is given"),
        (("pack", "--dataset", "{data}", "--out", "{tmp}/s", "n_layers=9"), 2, "did you mean 'n_layer'"),
        (("join", "{tmp}", "--out", "{tmp}/model"), 1, "no report.json there"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    arguments: tuple[str, ...],
    code: int,
    told: str,
    shipment: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(_tool("run"), "STARTED", time.monotonic())
    work = ("--work", "{tmp}/work") if arguments[0] == "run" else ()
    places = {"tmp": tmp_path, "shipment": shipment, "data": dataset}
    assert _main(*(text.format(**places) for text in (*arguments, *work))) == code
    complaint = capsys.readouterr().err
    assert told in complaint
    assert complaint.count("\n") == 1


def test_a_damaged_shipment_is_told(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "shipment"
    assert _main("pack", "--dataset", dataset, "--out", packed, *TINY) == 0
    capsys.readouterr()
    tokens = packed / "train.tokens.xz"
    tokens.write_bytes(tokens.read_bytes()[:-9])
    ran = ("--out", tmp_path / "out", "--work", tmp_path / "work", "--until", 100000)
    assert _main("run", "--shipment", packed, *ran) == 1
    complaint = capsys.readouterr().err
    assert "train.tokens.xz: cannot be read" in complaint
    assert complaint.count("\n") == 1


@pytest.fixture
def box(tmp_path: Path) -> Any:
    """Model in several parts, with a report that tells of them."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8)
    outbox = _tool("parts").Outbox(tmp_path / "back", part_bytes=2000)
    # As a run with scanned layers has them.
    params = jax.device_get(stacked(_random_params(config), config.n_layer))
    weights = outbox.write_weights(params, replace(config, layers="scanned"))
    outbox.write_report({"weights": weights, "training": {"step": 1}})
    return outbox


def test_weights_in_parts_are_those_that_left(box: Any) -> None:
    assert len(list(box.folder.glob("weights-*.npz"))) > 2
    config = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8)
    found, expected = _params(box.folder), flattened(_random_params(config))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float16).astype(np.float32))
    # Fewer parts the next time leave none of the last.
    _tool("parts").Outbox(box.folder).write_weights(_random_params(config), config)
    assert [path.name for path in box.folder.glob("weights-*.npz")] == ["weights-0.npz"]


def test_damaged_and_missing_parts_are_refused(box: Any, tmp_path: Path) -> None:
    part = box.folder / "weights-1.npz"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(ModelError, match=r"weights-1.npz: damaged, or of another call"):
        _tool("join").join(box.folder, tmp_path / "model")
    part.unlink()
    with pytest.raises(ModelError, match=r"weights-1.npz: is missing"):
        _tool("parts").read_parts(box.folder)
    assert not (tmp_path / "model").exists()
    report = _report(box.folder)
    report["weights"]["files"][0]["name"] = "../elsewhere.npz"
    box.write_report(report)
    with pytest.raises(ModelError, match="not in the folder"):
        _tool("parts").read_parts(box.folder)
    box.write_report({"checks": {}})
    with pytest.raises(ModelError, match="tells of no weights"):
        _tool("parts").read_parts(box.folder)


def test_rows_come_in_another_order_every_epoch_and_go_on_anywhere() -> None:
    numbers = _tool("batches").row_numbers
    first, second = numbers(0, 10, rows=10, seed=3), numbers(10, 10, rows=10, seed=3)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    np.testing.assert_array_equal(numbers(7, 9, rows=10, seed=3), np.concatenate([first[7:], second[:6]]))
    assert list(numbers(0, 10, rows=10, seed=4)) != list(first)


def test_batches_are_the_rows_of_their_numbers(dataset: Path) -> None:
    batches = _tool("batches")
    config = TrainConfig(
        block_size=BLOCK, batch_size=2, gradient_accumulation_steps=3, windows="packed", seed=5
    )
    rows = open_rows(TokenStore.open(dataset), block_size=BLOCK, windows="packed", seed=5)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    feed = batches.Batches(rows, config, first_row=4, sharding=sharding)
    for step in range(2 * batches.AHEAD):
        numbers = batches.row_numbers(4 + 6 * step, 6, rows=len(rows), seed=5)
        expected = rows.read(numbers)
        for name, found, whole in zip(Batch._fields, feed.take(), expected, strict=True):
            assert found.shape == (3, 2, *whole.shape[1:])
            np.testing.assert_array_equal(np.asarray(found).reshape(whole.shape), whole, err_msg=name)
    feed.close()
    broken = batches.Batches(None, config, first_row=0, sharding=sharding)
    with pytest.raises(TypeError):
        broken.take()
    broken.close()


def test_the_clock_ends_by_time_or_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _tool("clock")
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    clock = module.Clock(started=100.0, until=20.0, reserve=5.0, decay_share=0.2)
    now = 105.0
    clock.begin()
    # 10 s to train in, the last 2 of them for the decay.
    now = 112.0
    assert clock.progress(9) < 0
    now = 114.0
    assert clock.progress(9) == pytest.approx(0.5)
    now = 115.0
    assert clock.progress(9) == pytest.approx(1.0)
    now = 105.0
    steps = module.Clock(started=100.0, until=1e6, reserve=5.0, decay_share=0.5, max_steps=10)
    steps.begin()
    assert [steps.progress(step) for step in (0, 5, 6, 10)] == pytest.approx([-1.0, 0.0, 0.2, 1.0])
    now = 1e6 + 100
    with pytest.raises(ConfigError, match="none is left"):
        steps.check()


def test_the_rate_is_that_of_the_schedule_in_its_decay(shipment: Path, tmp_path: Path) -> None:
    clock = _tool("clock")
    config = _tool("shipment").open_shipment(shipment, tmp_path).config
    params = {"h_0": {"mlp": {"c_fc": {"kernel": jnp.ones((2, 3))}}}, "wte": {"embedding": jnp.ones((4, 2))}}
    state = create_state(config, params)
    schedule = learning_rate_schedule(config)
    for progress in (0.0, 0.25, 1.0):
        moved = jax.tree.leaves(
            clock.at_decay(state, config, progress).opt_state,
            is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState),
        )
        counts = [int(node.count) for node in moved if isinstance(node, optax.ScaleByScheduleState)]
        assert len(counts) == 2  # of Muon and of AdamW
        for count in counts:
            rate = clock.decayed_rate(config, progress)
            assert float(schedule(count)) == pytest.approx(rate, abs=1e-9)


def test_attentions_are_compared_by_loss_and_gradients(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = _tool("checks")
    monkeypatch.setattr(checks, "LAYERS", 1)
    config = ModelConfig(n_layer=4, n_head=2, n_embd=32, block_size=BLOCK, dropout=0.1, dtype="bfloat16")
    batch = open_rows(TokenStore.open(dataset), block_size=BLOCK, windows="packed", seed=0).read(np.arange(4))
    result = checks.compare_attention(config, batch, "blocked", "xla")
    assert result["passed"] is True, result
    assert 4 < result["loss"]["xla"] < 8
    assert result["gradient_difference"] > 0

    def loss(config: ModelConfig, params: Any, batch: Batch) -> jax.Array:
        """Of the same value and the same norm of the gradient with both, and another direction."""
        kernel = params["h_0"]["attn"]["c_proj"]["kernel"]
        sign = jnp.where(jnp.arange(kernel.size) < kernel.size / 4, -1, 1).reshape(kernel.shape)
        moved = kernel - jax.lax.stop_gradient(kernel)
        return 5 + jnp.sum(moved * sign if config.attention == "blocked" else moved)

    monkeypatch.setattr(checks, "batch_loss", loss)
    result = checks.compare_attention(config, batch, "blocked", "xla")
    assert result["passed"] is False
    assert result["loss_difference"] == 0
    assert result["gradient_difference"] == pytest.approx(1.0)


def test_golden_parity_of_the_published_code(golden: Path) -> None:
    result = _tool("checks").golden_parity(golden)
    assert result["passed"] is True, result
    assert result["greedy"] == {"tokens": 66, "equal": 66}
