"""Fine-tuning: from a folder of CIFs and the model in the package to samples."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest

import crystallm_jax as cl
from crystallm_jax.config import find_config, load_config
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import Split
from crystallm_jax.errors import ModelError
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.loop import run

CRYSTALS, HELD_OUT = 16, 4
STEPS = 6
# For speed: short rows, one compiled block.
SHORT = ["block_size=128", "batch_size=2", "layers=scanned", "windows=starts", "dropout=0", "patience=0"]
BRIEF = [f"max_iters={STEPS}", "lr_decay_iters=1000", "warmup_iters=1", "eval_interval=3", "eval_iters_val=2"]


class Runs(NamedTuple):
    """Two runs over the same data: from the model in the package, and from scratch."""

    tuned: Path
    scratch: Path


def _config(dataset: Path, out_dir: Path, *settings: str) -> TrainConfig:
    given = [f"dataset={dataset}", f"out_dir={out_dir}", *SHORT, *BRIEF, *settings]
    return load_config(TrainConfig, find_config("finetune"), given)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structures")
    for record in itertools.islice(read_corpus(), CRYSTALS):
        (folder / f"{record.id}.cif").write_text(record.text)
    out = tmp_path_factory.mktemp("dataset") / "mine"
    report = prepare([folder], out, selection=Selection(split=Split(HELD_OUT, 2)), progress=False)
    assert report.n_kept == CRYSTALS
    return out


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    found = Runs(folder / "tuned", folder / "scratch")
    run(_config(dataset, found.tuned))
    run(_config(dataset, found.scratch, "init_from=scratch"))
    return found


def _losses(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_the_model_in_the_package_knows_crystals_already(runs: Runs) -> None:
    assert _losses(runs.tuned, "loss")[0] < 2.5
    assert _losses(runs.scratch, "loss")[0] > 5


def test_it_learns_the_new_ones_and_stays_ahead_of_a_new_model(runs: Runs) -> None:
    tuned, scratch = _losses(runs.tuned, "val_loss"), _losses(runs.scratch, "val_loss")
    assert len(tuned) == len(scratch) == STEPS // 3
    assert tuned[-1] < tuned[0]
    assert tuned[-1] < scratch[-1] - 1


def test_what_was_tuned_is_sampled_from(runs: Runs) -> None:
    model = cl.load_model(runs.tuned)
    (sample,) = model.generate(cl.make_prompt("Na4Cl4"), max_new_tokens=8, top_k=1)
    assert sample.text.startswith("data_Na4Cl4\n")
    assert model.config.block_size == 128


def test_a_shape_that_the_model_does_not_have_is_refused_with_both(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="default: its model has n_layer=6, the configuration says n_layer=5"
    ):
        run(dataclasses.replace(_config(dataset, tmp_path), n_layer=5))
