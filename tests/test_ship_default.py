"""From the run of the model in the package to the package: the decay, what it is worth, and the exchange of models."""

import importlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.cli import main as crystallm
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ModelError
from crystallm_jax.models.card import read_card
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import read_folder
from crystallm_jax.train_run.metrics import read_metrics
from crystallm_jax.training import runlog

ROOT = Path(__file__).parents[1]
STEPS, DECAY = 6, 3
COUNT = 2
CONTEXT = 256


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared folders, and a run of a few steps."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = CIFTokenizer()
    records = [stream_text(preprocess_cif(record.text)) for record in itertools.islice(read_corpus(), 16)]
    for name in ("known", "others"):
        with StoreWriter(home / name) as out:
            for i, text in enumerate(records):
                split = "train" if i < 10 else "val" if i < 13 else "test"
                out.add(f"crystal-{i}", tokenizer.encode_cif(text), split=split)
            out.commit(sources=(), options={}, counts={}, versions={})
    settings = (
        *("n_layer=1", "n_head=2", "n_embd=16", f"block_size={CONTEXT}", "batch_size=2", "eval_iters_val=1"),
        *("warmup_iters=2", f"dataset={home / 'known'}", f"out_dir={home / 'runs' / 'default'}"),
        # What compiles faster; the branch of a run of Muon's is tested elsewhere.
        *(f"max_iters={STEPS}", "checkpoint_interval=3", "optimizer=adamw", "validate=false"),
    )
    with pytest.MonkeyPatch.context() as patch:
        # Measured for utilisation, which takes seconds.
        patch.setattr(runlog, "device_peak_flops", lambda _: None)
        assert crystallm(["train", "--config", str(ROOT / "configs" / "default.yaml"), *settings]) == 0
    return home


def _arguments(home: Path, *more: str) -> list[str]:
    return [
        *("--run", str(home / "runs" / "default"), "--decay-iters", str(DECAY), "--dtype", "float32"),
        *("--test-dataset", str(home / "others"), "--count", str(COUNT), "--crystals", "crystals of a test"),
        *("--scratch", str(home / "measured"), "--results", str(home / "results.json")),
        *("--target", str(home / "assets" / "default"), *more),
    ]


@pytest.fixture(autouse=True)
def quick(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, known_losses: dict[str, Any]
) -> None:
    """The loss of a model on a set is computed once, for each time compiles it anew; the machine's peak never."""
    measuring = tool("measure_default")
    compute = measuring.loss_of_files

    def once(weights: Model, store: TokenStore) -> object:
        key = f"{measuring.digest_of(weights)} {store.folder} {weights.config.block_size}"
        if key not in known_losses:
            known_losses[key] = compute(weights, store)
        return known_losses[key]

    monkeypatch.setattr(measuring, "loss_of_files", once)
    monkeypatch.setattr(runlog, "device_peak_flops", lambda _: None)


@pytest.fixture(scope="module")
def known_losses() -> dict[str, Any]:
    return {}


@pytest.fixture
def shipped(home: Path, tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model of the run, shipped once; the first call was stopped while it measured."""
    target = home / "assets" / "default"
    if target.exists():
        return target
    measuring = tool("measure_default")
    loss_of_files = measuring.loss_of_files

    def stopped(*given: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return loss_of_files(*given)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "loss_of_files", stopped)
        assert tool("ship_default").main(_arguments(home)) == 75
    assert not target.exists()
    assert tool("ship_default").main(_arguments(home, "--tokens-before", "1000")) == 0
    return target


def test_the_end_of_a_decay_is_shipped_with_its_card(home: Path, shipped: Path) -> None:
    decay = home / "runs" / f"decay_{STEPS}"
    rates = {line["step"]: line["lr"] for line in read_metrics(decay / "metrics.jsonl")}
    assert list(rates) == [STEPS + 1, STEPS + 2, STEPS + 3]
    assert rates[STEPS + 1] > rates[STEPS + 2] > rates[STEPS + 3] > 0
    weights = read_folder(shipped)
    assert (weights.config.block_size, weights.config.dtype) == (CONTEXT, "float32")
    assert weights.params["wte"]["embedding"].dtype == np.float32
    assert (shipped / "model.safetensors").stat().st_size < 3 * sum(
        np.size(leaf) for leaf in (weights.params["wte"]["embedding"], weights.params["wpe"]["embedding"])
    )
    card = read_card(shipped)
    assert card.license == "cc-by-4.0"
    assert card.data == "10 crystals of a test; 3 for validation and 3 for test were kept back"
    assert card.metrics["step"] == STEPS + DECAY
    assert card.metrics["tokens"] == 1000 + (STEPS + DECAY) * 2 * CONTEXT
    assert card.metrics["val_loss"] == card.metrics["val_loss_others"]
    assert {"valid_share_1.0", "valid_share_0.5", "valid_share_symmetry_1.0"} <= card.metrics.keys()
    assert (
        f"init_from=RUN/checkpoints/{STEPS} init_state=all max_iters={STEPS + DECAY}" in card.training_command
    )
    assert "| 0.5 | symmetry | " in card.text
    assert "their moving average" in card.text
    assert str(home) not in card.to_markdown()
    assert not list(shipped.parent.glob(".*"))


def test_every_composition_counts(home: Path, shipped: Path) -> None:
    results = json.loads((home / "results.json").read_text())
    (name, measured), *others = results["models"].items()
    assert others == []
    assert name.startswith(f"decay_{STEPS} ")
    assert measured["losses"].keys() == {"known", "others"}
    assert measured["losses"]["known"]["targets"] > 0
    for row in measured["validity"]:
        assert row["samples"] == COUNT == row["valid"] + sum(row["reasons"].values())
        # Their shortest texts do not fit the context; unconstrained samples just end with it.
        assert (row["reasons"] == {"too_long": COUNT}) == (row["constrain"] is not None)
    assert [(row["constrain"], row["temperature"]) for row in measured["validity"]] == [
        (None, 1.0),
        (None, 0.5),
        ("symmetry", 1.0),
        ("symmetry", 0.5),
        ("positions", 1.0),
        ("positions", 0.5),
    ]


def test_a_model_that_is_no_better_stays_out_unless_forced(
    home: Path, shipped: Path, tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (shipped / "MODEL_CARD.md").read_bytes()
    ship = tool("ship_default").main
    assert ship(_arguments(home, "--tokens-before", "2000")) == 0
    told = capsys.readouterr().out
    assert "is not shipped: its validation loss on known is " in told
    assert "its validation loss on others is " in told
    assert (shipped / "MODEL_CARD.md").read_bytes() == before
    assert ship(_arguments(home, "--tokens-before", "2000", "--force", "--dry-run")) == 0
    assert (shipped / "MODEL_CARD.md").read_bytes() == before
    assert ship(_arguments(home, "--tokens-before", "2000", "--force")) == 0
    assert "though its validation loss" in capsys.readouterr().out
    assert read_card(shipped).metrics["tokens"] == 2000 + (STEPS + DECAY) * 2 * CONTEXT


def test_any_model_is_measured_alike(
    home: Path, shipped: Path, tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--dataset",
        str(home / "known"),
        "--evaluate-only",
        str(shipped),
        "--results",
        str(home / "r.json"),
    ]
    assert tool("ship_default").main(_arguments(home, *given)) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("default: weights ")
    assert told[0].endswith(f", context {CONTEXT}")
    assert [line.split(" on ")[1].split(":")[0] for line in told[1:3]] == ["known", "others"]
    results = json.loads((home / "results.json").read_text())["models"]
    again = json.loads((home / "r.json").read_text())["models"]
    (ours,), (theirs,) = results.values(), again.values()
    assert {**ours, "name": ""} == {**theirs, "name": ""}


def test_a_model_too_large_for_the_package_is_refused(
    home: Path,
    shipped: Path,
    tool: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (shipped / "model.safetensors").read_bytes()
    monkeypatch.setattr(tool("ship_default"), "MOST_BYTES", 10_000)
    assert tool("ship_default").main(_arguments(home, "--force")) == 1
    assert "are more than a model in the package may take, 10,000" in capsys.readouterr().err
    assert (shipped / "model.safetensors").read_bytes() == before


def test_a_decay_goes_on_where_it_was_and_others_are_refused(
    tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    branches = tool("default_branch")
    run = tmp_path / "default"
    with pytest.raises(ModelError, match="has no checkpoint to branch off"):
        branches.find_branch(run, None, None)
    for step in (3000, 4000):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    branch = branches.find_branch(run, None, None)
    assert (branch.folder, branch.step, branch.last_step) == (tmp_path / "decay_4000", 4000, 4400)
    branches.write_branch(branch)
    (run / "checkpoints" / "5000").mkdir()
    assert branches.find_branch(run, None, None) == branch
    assert branches.find_branch(run, None, 400) == branch
    with pytest.raises(ModelError, match="a decay of 400 steps, not of --decay-iters 300"):
        branches.find_branch(run, None, 300)
    # The checkpoint that it was to begin from is gone, and it has none of its own.
    (run / "checkpoints" / "4000").rmdir()
    assert branches.find_branch(run, None, None).step == 5000
    (branch.folder / "checkpoints" / "4100").mkdir(parents=True)
    assert branches.find_branch(run, None, None) == branch
    branches.write_branch(branch, "shipped")
    assert branches.find_branch(run, None, 300).last_step == 5300
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").touch()
    with pytest.raises(ModelError, match=r"other: holds no decay of .*default: give another --out-dir"):
        branches.find_branch(run, other, None)
    shutil.copytree(run, tmp_path / "second")
    with pytest.raises(ModelError, match=r"decay_4000: a decay of .*default, not of .*second"):
        branches.find_branch(tmp_path / "second", branch.folder, None)


# Swaps folders, and dies at a call of a function; without exchange, as where the system has none.
_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import swap_folder as module

new, target, at, exchanging = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True"
calls = []

def dying(function):
    def call(*given, **named):
        calls.append(function)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return call

if not exchanging:
    module.exchange = lambda *_: False
module.exchange = dying(module.exchange)
Path.rename = dying(Path.rename)
shutil.copy2 = dying(shutil.copy2)
shutil.rmtree = dying(shutil.rmtree)
module.swap_folder(new, target)
"""


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_kill_leaves_the_old_or_the_new(
    exchanging: bool, tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    new, target = _folder(tmp_path / "export", "new"), _folder(tmp_path / "default", "old")
    swap, seen = tool("swap_folder"), []
    for at in range(1, 20):
        command = [sys.executable, "-c", _KILLED, ROOT / "tools", new, target, str(at), str(exchanging)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not exchanging:
            swap.put_right(target)
        texts = {path.name: path.read_text() for path in target.iterdir()}
        assert texts.keys() == {"config.yaml", "model.safetensors"}
        (text,) = set(texts.values())
        seen.append(text)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        shutil.rmtree(target)
        _folder(target, "old")
    assert seen == ["old"] * seen.count("old") + ["new"] * seen.count("new")
    assert min(seen.count("old"), seen.count("new")) > 1
    assert {path.name for path in tmp_path.iterdir()} == {"export", "default"}


def test_a_folder_takes_the_place_of_none(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    new = _folder(tmp_path / "export", "new")
    tool("swap_folder").swap_folder(new, tmp_path / "assets" / "default")
    assert (tmp_path / "assets" / "default" / "config.yaml").read_text() == "new"
    assert new.is_dir()


def test_where_nothing_can_be_written_the_old_stays(
    tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, target = _folder(tmp_path / "export", "new"), _folder(tmp_path / "default", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(ModelError, match="cannot be replaced: No space left on device"):
        tool("swap_folder").swap_folder(new, target)
    assert (target / "config.yaml").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"export", "default"}
