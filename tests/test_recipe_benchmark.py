"""The benchmark of recipes: its cases are runs that can be made, and what has been run is gone on with."""

import argparse
import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.store import TokenStore
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import learning_rate_schedule

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOKENS = 409_600


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recipe")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return list(importlib.import_module("recipe_cases").cases())


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with StoreWriter(tmp_path / "data") as out:
        for number in range(20):
            out.add(str(number), rng.integers(0, 371, 50).astype(np.uint16), split="train")
        out.commit(sources=(), options={}, counts={}, versions={})
    return tmp_path / "data"


def test_every_case_is_a_run_of_its_own_that_reads_as_much(cases: list[Any]) -> None:
    assert len({case.key for case in cases}) == len(cases)
    known = {field.name for field in fields(TrainConfig)}
    for case in cases:
        settings = case.settings(tokens=TOKENS)
        assert settings.keys() <= known
        config = TrainConfig(**settings, gradient_accumulation_steps=1)
        assert config.max_iters * config.tokens_per_step == TOKENS, case.key
        rate = learning_rate_schedule(config)
        assert float(rate(config.warmup_iters)) == pytest.approx(config.learning_rate)
        if case.decay and config.min_lr == 0:
            assert float(rate(config.max_iters)) == pytest.approx(0, abs=1e-9)


def test_as_long_as_the_base_is_more_steps_where_they_are_faster(cases: list[Any]) -> None:
    case = next(case for case in cases if case.seconds)
    steps = case.settings(tokens=TOKENS)["max_iters"]
    assert case.settings(tokens=TOKENS, speed=1.5)["max_iters"] == round(1.5 * steps)
    other = next(case for case in cases if not case.seconds)
    assert other.settings(tokens=TOKENS, speed=1.5) == other.settings(tokens=TOKENS)


def test_a_cut_data_set_holds_the_first_records(recipe: ModuleType, dataset: Path, tmp_path: Path) -> None:
    folder = recipe.cut_short(dataset, 120, tmp_path / "cut")
    cut, whole = TokenStore.open(folder), TokenStore.open(dataset)
    assert len(cut) == 3
    for number in range(3):
        np.testing.assert_array_equal(cut.record(number), whole.record(number))
    assert recipe.cut_short(dataset, 120, folder) == folder


def test_the_report_is_gone_on_with_and_another_length_refused(
    recipe: ModuleType, cases: list[Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def started(script: str, job: dict[str, Any]) -> dict[str, Any]:
        begun.append(script)
        losses = [[step, 1.0] for step in range(1, 101)]
        return {"val_loss": 1.25, "steps": 100, "tokens": TOKENS, "train_losses": losses}

    monkeypatch.setattr(recipe, "start_child", started)
    out = tmp_path / "recipe.json"
    arguments = ["recipe.py", "--dataset", str(dataset), "--out", str(out), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "base|as published"])
    assert recipe.main() == 0
    assert sorted(begun) == ["recipe_jax.py", "recipe_jax.py", "recipe_torch.py"]
    assert recipe.main() == 0
    assert len(begun) == 3
    report = json.loads(out.read_text())
    assert len(report["runs"]["base, seed 1"]["train_losses"]) == recipe.KEPT_LOSSES
    lines = list(recipe.table(report))
    assert [line.split("  ")[0] for line in lines[1:]] == ["base", "as published", "as published, torch"]
    with pytest.raises(SystemExit, match="another base, --tokens or data set; give another --out"):
        recipe.opened(argparse.Namespace(dataset=dataset, out=out, tokens=TOKENS * 2))
