"""Samples in the middle of a run: whose compositions, what is counted, and that it is compiled once."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crystallm_jax import probe as probe_module
from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.cli import main
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.errors import SamplingError
from crystallm_jax.model import init_params
from crystallm_jax.model.stacking import stacked
from crystallm_jax.probe import ValidityProbe
from crystallm_jax.sampling.requests import Completion
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training import loop
from crystallm_jax.training.loop import RunResult
from crystallm_jax.training.sharding import make_mesh

ROOT = Path(__file__).parents[1]
TOKENIZER = CIFTokenizer()
CONFIG = TrainConfig(
    gradient_accumulation_steps=1,
    batch_size=2,
    block_size=64,
    n_layer=2,
    n_head=2,
    n_embd=32,
    dropout=0.1,
    dtype="float32",
    sample_interval=1,
    sample_count=3,
)
MODEL = CONFIG.model_config(TOKENIZER.vocab_size)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [
        stream_text(preprocess_cif(record.text)) for record, _ in zip(read_corpus(), range(8), strict=False)
    ]


@pytest.fixture(scope="module")
def dataset(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six records to train on, two held out."""
    folder = tmp_path_factory.mktemp("dataset")
    with StoreWriter(folder) as out:
        for i, text in enumerate(texts):
            out.add(str(i), TOKENIZER.encode_cif(text), split="train" if i < 6 else "val")
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def _config(dataset: Path, **changes: Any) -> TrainConfig:
    return replace(CONFIG, dataset=str(dataset), **changes)


@pytest.fixture(scope="module")
def params() -> Any:
    """As a run holds them, on a mesh; layers each for themselves."""
    made = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    return jax.device_put(made, NamedSharding(make_mesh(1, 1, jax.devices()[:1]), PartitionSpec()))


def test_compositions_are_those_of_held_out_records(dataset: Path, texts: list[str]) -> None:
    prompts = probe_module._prompts(_config(dataset), TOKENIZER)
    found = [TOKENIZER.decode(prompt) for prompt in prompts]
    held_out = {text.split("\n", 1)[0] + "\n" for text in texts[6:]}
    assert len(found) == 3
    assert set(found) == held_out
    assert found[2] == found[0]  # there are only two


def test_without_a_validation_set_the_training_set_is_asked_for_and_that_is_said(
    dataset: Path,
    tmp_path: Path,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("crystallm_jax"), "propagate", True)
    with StoreWriter(tmp_path / "alone") as out:
        out.add("0", TOKENIZER.encode_cif(texts[0]))
        out.commit(sources=(), options={}, counts={}, versions={})
    prompts = probe_module._prompts(_config(tmp_path / "alone"), TOKENIZER)
    assert {TOKENIZER.decode(prompt) for prompt in prompts} == {texts[0].split("\n", 1)[0] + "\n"}
    assert "has no validation set" in caplog.text


def test_a_context_too_short_for_any_composition_is_refused(dataset: Path) -> None:
    with pytest.raises(SamplingError, match=r"no composition .* fits the context of 1 tokens"):
        ValidityProbe(_config(dataset, block_size=1))


def test_every_sample_counts_whatever_became_of_it(
    dataset: Path, texts: list[str], params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A true crystal, the same cut short, and noise: one of three is valid, two came to their end."""
    whole = tuple(TOKENIZER.encode_cif(texts[0]).tolist())
    noise = tuple(np.random.default_rng(0).integers(0, 371, 40).tolist())

    def generated(*_: Any, **__: Any) -> Iterator[list[Completion]]:
        yield [Completion(0, 0, whole, -1.0, True), Completion(1, 0, whole[:60], -1.0, False)]
        yield [Completion(2, 0, noise, -1.0, True)]

    monkeypatch.setattr(probe_module, "generate", generated)
    monkeypatch.setattr(probe_module, "usable_cores", lambda: 1)
    with ValidityProbe(_config(dataset)) as probe:
        found = probe(1, params, MODEL)
    assert found == {"valid_share": 1 / 3, "finished_share": 2 / 3, "sampled": 3}


def test_stacked_layers_are_sampled_as_single_ones_and_nothing_is_compiled_twice(
    dataset: Path, params: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str] = []

    def submit(_: Any, text: str) -> Any:
        texts.append(text)
        return _Verdict()

    monkeypatch.setattr(probe_module.ValidatorPool, "submit", submit)
    trained = replace(MODEL, layers="scanned", remat="full")
    for config, tree in ((MODEL, params), (trained, stacked(params, MODEL.n_layer))):
        with ValidityProbe(_config(dataset)) as probe:
            first = probe(1, tree, config)
            with jax.log_compiles(), caplog.at_level(logging.WARNING):
                assert probe(2, tree, config) == first
        assert "ompiling" not in caplog.text
    assert len(texts) == 12
    assert texts[:3] == texts[3:6] == texts[6:9] == texts[9:]
    assert all(text.startswith("data_") for text in texts)


class _Verdict:
    valid = False

    def result(self) -> "_Verdict":
        return self


def test_the_command_samples_and_traces_where_it_is_told(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, Any]] = []

    def run(config: TrainConfig, *, probe: Any) -> RunResult:
        asked.append((config.profile_steps, probe))
        return RunResult(1, None, None)

    monkeypatch.setattr(loop, "run", run)
    words = ["train", f"dataset={dataset}", "out_dir=nowhere"]
    assert main(words) == 0
    assert main([*words, "sample_interval=5", "block_size=64", "--profile", "3"]) == 0
    assert asked[0] == (0, None)
    assert asked[1][0] == 3
    assert isinstance(asked[1][1], ValidityProbe)
    for wrong in ("0", "x"):
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--profile", wrong])
        assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_the_training_process_loads_no_pymatgen() -> None:
    code = "import sys, crystallm_jax.probe, crystallm_jax.training.loop; sys.exit('pymatgen' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=100)
