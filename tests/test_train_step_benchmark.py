"""The benchmark of the training step: its order of cases, its reasons, and that it needs little to run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crystallm_jax.config import find_config, load_config
from crystallm_jax.train_run.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"

_BARE = """
import importlib.abc, sys

ABSENT = {
    "grain", "omegaconf", "pymatgen", "spglib", "safetensors", "pandas", "scipy", "matplotlib", "tqdm", "ase", "pebble",
}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import train_step, train_step_jax
print(train_step_jax.probe(["small"])["models"]["small"]["parameters"])
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("train_step")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("train_step_cases")


def test_it_runs_where_jax_flax_and_optax_are_alone() -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", _BARE, str(FOLDER)],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["25888768"]


@pytest.mark.parametrize("model", ["small", "large"])
def test_its_models_are_the_published_ones(model: str, cases: ModuleType) -> None:
    config = load_config(TrainConfig, find_config(model))
    assert {key: getattr(config, key) for key in cases.MODELS[model]} == cases.MODELS[model]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_cases_come_by_how_much_they_differ_each_with_its_peer(platform: str, cases: ModuleType) -> None:
    swept = cases.sweep(platform, ["small", "large"], {}, differences=2, peer=True)
    assert len(swept) == len(set(swept))
    ours = [case for case in swept if case.framework == "jax"]
    assert {case.model for case in ours[:2]} == {"small", "large"}
    first = {case.model: case for case in ours[:2]}
    changes = [case.changes(first[case.model]) for case in ours]
    assert changes == sorted(changes)
    assert set(changes) == {0, 1, 2}
    for place, case in enumerate(swept):
        if case.framework == "jax":
            assert case.peer() in swept[: place + 2]


def test_given_values_replace_those_tried(cases: ModuleType) -> None:
    swept = cases.sweep(
        "gpu", ["large"], {"batch_size": (16, 32), "remat": ("dots",)}, differences=9, peer=False
    )
    assert {(case.batch_size, case.remat) for case in swept} == {(16, "dots"), (32, "dots")}
    assert swept[0].batch_size == 16


def test_what_cannot_run_has_a_reason_before_it_is_tried(cases: ModuleType) -> None:
    assert cases.Case(attention="cudnn").why_not("gpu") is None
    assert "NVIDIA" in cases.Case(attention="cudnn").why_not("cpu")
    assert "16-bit" in cases.Case(attention="cudnn", dtype="float32").why_not("gpu")
    assert "dropout" in cases.Case(attention="cudnn", attention_dropout=0.1).why_not("gpu")


@pytest.mark.parametrize(
    ("code", "stderr", "wanted"),
    [
        (
            1,
            "Traceback\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating",
            "out of memory",
        ),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (-9, "", "killed by signal 9, as for want of memory"),
        (1, "Traceback\nValueError: no such thing\nsome farewell", "ValueError: no such thing"),
        (1, "", "no message"),
    ],
)
def test_a_failure_has_a_reason_in_one_line(
    code: int, stderr: str, wanted: str, benchmark: ModuleType
) -> None:
    assert benchmark.reason(code, stderr) == wanted


def _call(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--out", str(out), *arguments])
    return benchmark.main()


def test_a_call_goes_on_from_the_report_of_the_last(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def start(script: str, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if "probe" in job:
            return {
                "platform": "gpu",
                "device": "a chip",
                "cores": 4,
                "versions": {"jax": "0"},
                "peak_flops": {"bfloat16": 1e15, "float32": 1e15},
                "models": {"small": {"flops_per_token": 2e8}, "large": {"flops_per_token": 2e9}},
            }
        started.append(f"{script} {job['case']['batch_size']} {job['micro_batches']}")
        if job["case"]["batch_size"] == 128 and "jax" in script:
            raise benchmark.ChildFailedError("out of memory")
        rate = 2e6 if "jax" in script else 1e6
        return {"tokens_per_s": [rate, 3 * rate, rate], "compile_s": 1.0, "peak_memory_bytes": 2**30}

    monkeypatch.setattr(benchmark, "start_child", start)
    settings = ["--models", "small", "--batch-size", "64,128", "--remat", "none", "--attention", "auto"]
    settings += ["--layers", "scanned", "--windows", "starts", "--dropout", "0.1", "--attention-dropout", "0"]
    settings += ["--dtype", "bfloat16"]
    out = tmp_path / "report.json"
    # No time: nothing is begun, and it says what is left.
    assert _call(benchmark, monkeypatch, out, *settings, "--minutes", "0") == 0
    assert started == []
    assert "2 left: give the same command again" in capsys.readouterr().out
    assert _call(benchmark, monkeypatch, out, *settings) == 0
    assert started == ["train_step_jax.py 64 4", "train_step_jax.py 128 2"]
    assert "out of memory" in capsys.readouterr().out
    # What is there is not measured again; the peer is new.
    assert _call(benchmark, monkeypatch, out, *settings, "--peer", "torch") == 0
    assert started[2:] == ["train_step_torch.py 64 4", "train_step_torch.py 128 2"]
    shown = capsys.readouterr().out
    assert "2.00 times the best of PyTorch" in shown
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["tokens_per_s"] == 2e6
    assert rows[0]["mfu"] == pytest.approx(0.4)
    assert rows[0]["times_torch"] == pytest.approx(2.0)
    assert rows[1]["reason"] == "out of memory"


def test_a_case_is_measured_as_the_loop_steps(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    jax_case = importlib.import_module("train_step_jax")
    monkeypatch.setitem(cases.MODELS, "tiny", {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32})
    case = cases.Case(model="tiny", batch_size=2, layers="scanned", windows="packed")
    found = jax_case.measure(case, micro_batches=2, seconds=0.0, runs=2, profile=None)
    assert len(found["tokens_per_s"]) == 2
    assert min(found["tokens_per_s"]) > 0
    assert found["compile_s"] > 0
    assert found["peak_memory_bytes"] >= found["planned_memory_bytes"] > 0
