"""Early stopping: what counts as better, and that a run ends, stays ended, and remembers over a resume."""

import dataclasses
import itertools
import logging
import math
from pathlib import Path

import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.config import load_config
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.errors import ConfigError
from crystallm_jax.models.kinds import read_model
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.early import Patience
from crystallm_jax.training.loop import run

# With a rate of 0 nothing is learnt: the first evaluation stays the best.
IDLE = TrainConfig(
    eval_interval=1,
    eval_iters_val=1,
    validate=True,
    patience=3,
    gradient_accumulation_steps=1,
    batch_size=2,
    block_size=32,
    n_layer=1,
    n_head=2,
    n_embd=16,
    learning_rate=0.0,
    decay_lr=False,
    max_iters=9,
    keep_checkpoints=1,
    dtype="float32",
)


def _waited(patience: Patience, *losses: float | None) -> list[int]:
    waited = []
    for step, loss in enumerate(losses, start=1):
        patience.note(step, loss)
        waited.append(patience.waited)
    return waited


def test_a_better_loss_begins_the_count_anew() -> None:
    patience = Patience(2)
    assert _waited(patience, 3.0, 2.0, 2.5, 1.5, 1.6) == [0, 0, 1, 0, 1]
    assert not patience.exhausted
    assert (patience.best, patience.best_step) == (1.5, 4)


def test_an_equal_loss_and_one_that_is_not_finite_are_not_better() -> None:
    patience = Patience(4)
    assert _waited(patience, math.nan, 2.0, 2.0, math.nan, math.inf) == [1, 0, 1, 2, 3]
    assert not patience.exhausted
    assert _waited(patience, 2.0) == [4]
    assert patience.exhausted


def test_steps_without_an_evaluation_do_not_count() -> None:
    patience = Patience(1)
    assert _waited(patience, 1.0, None, None) == [0, 0, 0]


def test_without_patience_nothing_ends() -> None:
    patience = Patience(0)
    _waited(patience, *[1.0] * 50)
    assert not patience.exhausted


def test_the_count_goes_on_from_what_was_kept() -> None:
    first, second = Patience(3), Patience(3)
    _waited(first, 1.0, 2.0, 2.0)
    second.set_state(first.get_state())
    assert _waited(second, 2.0) == [3]
    assert second.exhausted
    assert second.best == 1.0


@pytest.mark.parametrize("setting", ["validate=false", "eval_iters_val=0"])
def test_patience_without_a_validation_loss_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="patience=3 needs a validation loss: set validate=true"):
        load_config(TrainConfig, None, ["patience=3", "validate=true", setting])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = CIFTokenizer()
    with StoreWriter(folder) as out:
        for i, record in enumerate(itertools.islice(read_corpus(), 8)):
            tokens = tokenizer.encode_cif(stream_text(preprocess_cif(record.text)))
            out.add(record.id, tokens, split="train" if i < 6 else "val")
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def test_a_run_ends_when_nothing_gets_better_and_stays_ended(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(IDLE, dataset=str(dataset), out_dir=str(tmp_path / "run"))
    # Stopped in between, after two evaluations.
    assert run(dataclasses.replace(config, max_iters=2)).step == 2
    again = dataclasses.replace(config, existing_run="resume")
    with caplog.at_level(logging.INFO):
        ended = run(again)
    assert ended.step == 4  # the first evaluation and three without a better one
    assert "3 evaluations since the best validation loss" in caplog.text
    assert "of step 1 (patience=3)" in caplog.text
    # The best is kept beside the newest, and both can be loaded.
    folders = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()}
    assert "4" in folders
    assert read_model(tmp_path / "run" / "checkpoints" / "4").config.n_embd == IDLE.n_embd
    assert run(again).step == 4
