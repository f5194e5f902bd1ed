"""The benchmark of sampling: its cases, its limit, its table, and that it needs little to run."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from crystallm_jax.config import find_config, load_config
from crystallm_jax.train_run.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"

# Two rows at a time of unlike lengths, where nothing but jax, flax and numpy is installed.
_BARE = """
import importlib.abc, json, sys

ABSENT = {
    "grain", "omegaconf", "pymatgen", "spglib", "safetensors", "pandas", "scipy", "matplotlib", "tqdm", "ase", "pebble",
    "orbax", "optax",
}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import sampling, sampling_cases, sampling_jax
sampling_cases.MODELS["tiny"] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64}
case = sampling_cases.Case(model="tiny", batch_size=2, new_tokens=sys.argv[2])
found = sampling_jax.measure(case, waves=2, seconds=60.0, runs=2, copied=1 << 10)
print(json.dumps(found))
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("sampling")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("sampling_cases")


def test_it_measures_rows_of_unlike_length_where_jax_and_flax_are_alone() -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", _BARE, str(FOLDER), "3-20"],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 4
    assert len(found["tokens_per_s"]) == 2
    assert min(found["tokens_per_s"]) > 0
    assert found["compile_s"] > 0
    assert found["compilations_in_runs"] == 0
    assert found["bandwidth"] > 0


def test_its_models_are_the_published_ones(cases: ModuleType) -> None:
    for model in ("small", "large"):
        config = load_config(TrainConfig, find_config(model))
        assert {key: getattr(config, key) for key in cases.MODELS[model]} == cases.MODELS[model]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_each_case_is_followed_by_its_peers_once(platform: str, cases: ModuleType) -> None:
    swept = cases.sweep(platform, ["small", "large"], {}, peers=("transformers", "published"))
    assert len(swept) == len(set(swept))
    ours = [case for case in swept if case.framework == "jax"]
    assert [case.model for case in ours[:2]] == ["small", "large"]
    for case in ours:
        assert swept.index(case.peer()) > swept.index(case)
        assert case.published() in swept
    # One precision of one model has one published way, whatever the batch.
    published = [case for case in swept if case.framework == "published"]
    assert len(published) == 2 * len(cases.DTYPES[platform])


def test_rows_of_unlike_length_are_the_same_for_everyone(cases: ModuleType) -> None:
    mixed = cases.Case(batch_size=8, new_tokens="100-1000")
    limits = mixed.limits(4)
    assert limits == mixed.peer().limits(4)
    assert len(limits) == 32
    assert 100 <= min(limits) < max(limits) <= 1000
    assert cases.Case(batch_size=3, new_tokens="350").limits(4) == [350] * 3
    assert len({tuple(prompt) for prompt in cases.prompts_of(32)}) == 32


def test_a_length_beyond_the_context_has_a_reason(cases: ModuleType) -> None:
    assert cases.Case(new_tokens="100-1000").why_not() is None
    assert cases.Case(new_tokens="1020").why_not() == "12 + 1020 tokens do not fit the context"


def test_the_limit_counts_weights_once_a_step_and_filled_positions(
    cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.MODELS, "tiny", {"n_layer": 2, "n_head": 2, "n_embd": 4, "block_size": 64})
    monkeypatch.setattr(cases, "VOCAB_SIZE", 10)
    case = cases.Case(model="tiny", batch_size=2, cache_dtype="bfloat16")
    parameters = 2 * (12 * 16 + 2 * 4) + 10 * 4 + 4
    # Rows of 3, 1 and 1 tokens in two places: three steps; 12 + 13 + 14, 12, and 12 positions.
    found = cases.bytes_to_read(case, [3, 1, 1])
    assert found == {"steps": 3, "weights": 3 * parameters * 4, "cache": 63 * 2 * 2 * 4 * 2}


def _call(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--out", str(out), *arguments])
    return benchmark.main()


def test_a_call_goes_on_from_the_report_of_the_last(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def start(script: str, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if "probe" in job:
            versions = {"jax": "0"}
            return {"platform": "cpu", "device": "a chip", "cores": 4, "versions": versions, "models": {}}
        case = job["case"]
        started.append(f"{case['framework']} {case['batch_size']} {case['new_tokens']}")
        if case["batch_size"] == 8 and case["framework"] == "jax":
            raise benchmark.ChildFailedError("out of memory")
        rate = {"jax": 700.0, "transformers": 350.0, "published": 7.0}[case["framework"]]
        found = {
            "tokens_per_s": [rate, 3 * rate, rate],
            "rows": 1,
            "compile_s": 1.0,
            "peak_memory_bytes": 2**30,
        }
        return found | ({"bandwidth": 1e9} if case["framework"] == "jax" else {"versions": {"torch": "0"}})

    monkeypatch.setattr(benchmark, "start_child", start)
    settings = ["--models", "small", "--batch-size", "32,8", "--new-tokens", "350"]
    out = tmp_path / "report.json"
    # No time: nothing is begun, and it says what is left.
    assert _call(benchmark, monkeypatch, out, *settings, "--minutes", "0") == 0
    assert started == []
    assert "2 left: give the same command again" in capsys.readouterr().out
    assert _call(benchmark, monkeypatch, out, *settings) == 0
    assert started == ["jax 32 350", "jax 8 350"]
    assert "out of memory" in capsys.readouterr().out
    # What is there is not measured again; the peers are new.
    assert _call(benchmark, monkeypatch, out, *settings, "--peer", "transformers,published") == 0
    assert started[2:] == ["transformers 32 350", "published 1 350", "transformers 8 350"]
    shown = capsys.readouterr().out
    assert "2.00 structures of 350 tokens a second, 100 times the published way (0.020)" in shown
    assert "small, float32, batch 32, 350 tokens: 2.00 (0.67-6.00) times transformers" in shown
    report = json.loads(out.read_text())
    ours = next(row for row in report["rows"] if row["case"]["framework"] == "jax")
    assert ours["tokens_per_s"] == 700.0
    least = (ours["least_bytes"]["weights"] + ours["least_bytes"]["cache"]) / 1e9
    assert ours["share_of_limit"] == pytest.approx(least / (32 * 350 / 700.0))
    assert report["versions_of_peer"] == {"torch": "0"}
    # Another number of rows is another measurement.
    with pytest.raises(SystemExit, match="--waves 4; give another --out"):
        _call(benchmark, monkeypatch, out, *settings, "--waves", "8")


def test_an_unknown_peer_is_refused(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(benchmark, monkeypatch, tmp_path / "report.json", "--peer", "vllm") == 2
    assert "--peer vllm: there are transformers, published" in capsys.readouterr().err


class FakeModel:
    """Writes a text of a prompt and ten tokens more for each sample; the first of a prompt comes to its end."""

    name = "fake"
    num_params = 1

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.tokenizer = SimpleNamespace(encode_cif=lambda prompt: [0] * len(prompt))

    def generate_batches(self, prompts: list[str], request: Any) -> Any:
        self.requests.append(request)
        for index, prompt in enumerate(prompts):
            samples = [
                SimpleNamespace(prompt_index=index, token_ids=(0,) * (len(prompt) + 10), finished=number == 0)
                for number in range(request.num_samples)
            ]
            yield samples


def test_ways_to_sample_are_compared_on_the_same_prompts_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    trained = importlib.import_module("sampling_trained")
    model = FakeModel()
    options = argparse.Namespace(rounds=2, num_samples=2, batch_size=8, seed=5)

    def judge(sample: Any) -> Any:
        return SimpleNamespace(result=lambda: SimpleNamespace(valid=sample.prompt_index == 0))

    rows = trained.measure(model, ["data_A\n", "data_Bb\n"], ("none", "syntax"), options=options, judge=judge)
    assert [request.seed for request in model.requests] == [5] * 4 + [6] * 2
    assert [request.constrain for request in model.requests[:2]] == [None, "syntax"]
    for row in rows:
        assert (row["tokens_per_sample"], row["finished"], row["valid"]) == (10, 0.5, 0.5)
        assert row["valid_per_s"] > 0
        assert row["compilations_in_runs"] == 0
    trained.add_ratios(rows)
    assert rows[0]["times_first"] == 1.0
    assert rows[1]["times_first"] == rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
