"""Steps whose loss is not finite: the run stops or goes on, and says which records it was."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.feed import open_feed
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError, ModelError
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training import step as step_module
from crystallm_jax.training.loop import run
from crystallm_jax.training.nonfinite import NonFiniteSteps
from crystallm_jax.training.step import StepMetrics

TINY = TrainConfig(
    eval_interval=6,
    gradient_accumulation_steps=2,
    batch_size=2,
    block_size=32,
    n_layer=1,
    n_head=2,
    n_embd=16,
    learning_rate=1e-3,
    max_iters=6,
    lr_decay_iters=6,
    warmup_iters=1,
    dtype="float32",
)
FINE = {"loss": 2.0, "micro_losses": [1.0, 3.0], "grad_norm": 1.0, "param_norm": 9.0}
BAD = FINE | {"loss": float("nan"), "micro_losses": [1.0, float("nan")], "grad_norm": float("inf")}


def _metrics(values: dict[str, Any]) -> StepMetrics:
    arrays = {name: np.asarray(value, np.float32) for name, value in values.items()}
    return StepMetrics(**arrays, learning_rate=np.float32(0), update_norm=np.float32(0), skipped=np.int32(0))


def _feed() -> Any:
    return SimpleNamespace(record_ids=lambda step: [[[f"a{step}", "b"]], [["c"]]])


def test_a_run_that_is_to_stop_leaves_the_ids_of_the_step(tmp_path: Path) -> None:
    steps = NonFiniteSteps(TrainConfig(out_dir=str(tmp_path)), _feed())
    steps.check(6, _metrics(FINE), 5)
    with pytest.raises(ModelError) as caught:
        steps.check(7, _metrics(BAD), 5)
    message, path = str(caught.value), tmp_path / "non_finite_step_7.json"
    assert "\n" not in message
    for part in ("step 7: the loss is nan, the gradient's norm inf", str(path), "non_finite=skip", "step 5"):
        assert part in message
    assert json.loads(path.read_text()) == {
        "step": 7,
        "loss": "nan",
        "grad_norm": "inf",
        "micro_batches": [{"loss": 1.0, "rows": [["a7", "b"]]}, {"loss": "nan", "rows": [["c"]]}],
    }
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_run_that_is_to_go_on_tells_of_some_and_stops_after_a_hundred_in_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = NonFiniteSteps(TrainConfig(out_dir=str(tmp_path), non_finite="skip"), _feed())
    with caplog.at_level(logging.WARNING, logger="crystallm_jax"):
        for step in range(1, 100):
            steps.check(step, _metrics(BAD), None)
        steps.check(100, _metrics(FINE), None)
        for step in range(101, 200):
            steps.check(step, _metrics(BAD), None)
        with pytest.raises(
            ModelError, match=r"step 200: .* as of the 99 steps before it, which were skipped"
        ):
            steps.check(200, _metrics(BAD), None)
    assert len(caplog.messages) == 20
    assert caplog.messages[0].startswith("step 1: the loss is nan")
    assert caplog.messages[-1].endswith("later ones are only counted")
    assert len(list(tmp_path.iterdir())) == 21


def test_parameters_that_are_not_finite_always_stop_the_run(tmp_path: Path) -> None:
    steps = NonFiniteSteps(TrainConfig(out_dir=str(tmp_path), non_finite="skip"), _feed())
    with pytest.raises(ModelError, match=r"step 3: the norm of the parameters is inf .* begin anew"):
        steps.check(3, _metrics(FINE | {"param_norm": float("inf")}), None)


@pytest.mark.parametrize("error", [DataError("no list of ids"), OSError(28, "No space left on device")])
def test_records_that_cannot_be_written_out_do_not_hide_the_loss(tmp_path: Path, error: Exception) -> None:
    def fail(_: int) -> None:
        raise error

    feed: Any = SimpleNamespace(record_ids=fail)
    steps = NonFiniteSteps(TrainConfig(out_dir=str(tmp_path)), feed)
    with pytest.raises(ModelError, match=r"step 7: the loss is nan.*(no list of ids|No space left)"):
        steps.check(7, _metrics(BAD), None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = CIFTokenizer()
    with StoreWriter(folder) as out:
        for record in itertools.islice(read_corpus(), 40):
            tokens = tokenizer.encode_cif(stream_text(preprocess_cif(record.text)))
            out.add(record.id, tokens, split="train", underrepresented=False)
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def _poisoned(dataset: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the loss of the second micro-batch of a step not a number; the id of the record in its first row."""
    store = TokenStore.open(dataset)
    feed = open_feed(store, block_size=32, windows="starts", batch_size=2, micro_batches=2, seed=TINY.seed)
    row = next(itertools.islice(feed, step - 1, None)).tokens[1, 0]
    ids = feed.record_ids(step)
    feed.close()
    loss = step_module.batch_loss

    def poisoned(config: Any, params: Any, batch: Any, dropout_key: Any = None) -> Any:
        struck = jnp.any(jnp.all(jnp.asarray(batch.tokens) == row, axis=-1))
        return loss(config, params, batch, dropout_key) * jnp.where(struck, jnp.nan, 1.0)

    monkeypatch.setattr(step_module, "batch_loss", poisoned)
    return ids[1][0][0]


def test_a_skipped_step_changes_nothing_is_counted_and_names_its_records(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    culprit = _poisoned(dataset, 3, monkeypatch)
    result = run(dataclasses.replace(TINY, dataset=str(dataset), out_dir=str(tmp_path), non_finite="skip"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.step == 6
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    assert lines[2]["param_norm"] == lines[1]["param_norm"]
    assert lines[2]["update_norm"] == 0
    found = json.loads((tmp_path / "non_finite_step_3.json").read_text())
    losses = [micro_batch["loss"] for micro_batch in found["micro_batches"]]
    assert isinstance(losses[0], float)
    assert losses[1] == "nan"
    assert found["micro_batches"][1]["rows"][0][0] == culprit
