"""Whole runs: what stops one, what is left on disk, and that going on gives what would have come anyway."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.config import load_config
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.rows import evaluation_batches, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ConfigError, CrystallmError, DataError, ModelError
from crystallm_jax.model import init_params
from crystallm_jax.models.kinds import read_model
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import write_folder
from crystallm_jax.signals import EXIT_AGAIN, StoppedError
from crystallm_jax.train_run.metrics import MetricsLog
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.loop import run
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import batch_loss, compile_steps

ROOT = Path(__file__).parents[1]
STEPS = 12
TINY = TrainConfig(
    eval_interval=6,
    checkpoint_interval=5,
    eval_iters_val=2,
    validate=True,
    gradient_accumulation_steps=2,
    batch_size=2,
    block_size=32,
    n_layer=1,
    n_head=2,
    n_embd=16,
    dropout=0.1,
    learning_rate=1e-2,
    min_lr=1e-3,
    max_iters=STEPS,
    lr_decay_iters=STEPS,
    warmup_iters=2,
    dtype="float32",
)

# Runs the command line, and after a step is logged and a checkpoint complete does what its first argument says;
# "in a step": is killed as soon as that step is on its way.
_FAULTY = """
import os, resource, signal, sys, time
from pathlib import Path
from crystallm_jax.cli import main
from crystallm_jax.training.batches import PlacedBatches
from crystallm_jax.train_run.metrics import MetricsLog

fault, at, checkpoint, write = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), MetricsLog.write

def write_and_fail(log, **values):
    write(log, **values)
    if values["step"] != at:
        return
    while not checkpoint.exists():
        time.sleep(0.01)
    if fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    else:
        os.kill(os.getpid(), signal.Signals[fault])

taken, take, prefetch = [], PlacedBatches.take, PlacedBatches.prefetch

def take_when_saved(batches):
    taken.append(None)
    while len(taken) == at and not checkpoint.exists():
        time.sleep(0.01)
    return take(batches)

def prefetch_or_die(batches):
    if len(taken) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    prefetch(batches)

if fault == "in a step":
    PlacedBatches.take, PlacedBatches.prefetch = take_when_saved, prefetch_or_die
else:
    MetricsLog.write = write_and_fail
sys.exit(main(["train", *sys.argv[4:]]))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first crystals of the embedded corpus, prepared."""
    folder = tmp_path_factory.mktemp("dataset")
    tokenizer = CIFTokenizer()
    with StoreWriter(folder) as out:
        for i, record in enumerate(itertools.islice(read_corpus(), 24)):
            tokens = tokenizer.encode_cif(stream_text(preprocess_cif(record.text)))
            out.add(
                record.id, tokens, split="train" if i < 20 else "val", underrepresented=i % 7 == 0 and i < 20
            )
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def _train(
    dataset: Path, out_dir: Path, *settings: str, fault: tuple[str, int, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One process of `train.py`; a fault is its name, the step, and the path that it waits for."""
    values = {**dataclasses.asdict(TINY), "dataset": dataset, "out_dir": out_dir}
    given = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    start = (
        ["train.py"] if fault is None else ["-c", _FAULTY, fault[0], str(fault[1]), str(out_dir / fault[2])]
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [sys.executable, *start, *given, *settings],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def _metrics(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def _learned(out_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what is measured of time and memory."""
    names = {"step", "tokens", "loss", "lr", "grad_norm", "param_norm", "update_norm", "skipped", "val_loss"}
    return [{name: line[name] for name in names & line.keys()} for line in _metrics(out_dir)]


def _steps(out_dir: Path) -> list[int]:
    return [line["step"] for line in _metrics(out_dir)]


def _latest(out_dir: Path) -> int | None:
    with Checkpoints(out_dir / "checkpoints") as checkpoints:
        return checkpoints.latest_step()


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("straight") / "run"
    done = _train(dataset, out_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"step {STEPS}: loss ")
    assert "\r" not in done.stderr  # no progress bar in a log
    return out_dir


class Left(NamedTuple):
    """How a process ended, and what it left of the run."""

    out_dir: Path
    process: subprocess.CompletedProcess[str]
    latest: int | None
    steps: list[int]


def _left(dataset: Path, out_dir: Path, *settings: str, fault: tuple[str, int, str] | None = None) -> Left:
    process = _train(dataset, out_dir, *settings, fault=fault)
    return Left(out_dir, process, _latest(out_dir), _steps(out_dir))


# The same run again, stopped, killed and out of disk on its way: each part goes on from what the one before left.


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    out_dir = tmp_path_factory.mktemp("broken") / "run"
    return _left(dataset, out_dir, fault=("SIGTERM", 2, "config.yaml"))


@pytest.fixture(scope="module")
def killed(dataset: Path, stopped: Left) -> Left:
    return _left(dataset, stopped.out_dir, "init_from=resume", fault=("SIGKILL", 7, "checkpoints/6"))


@pytest.fixture(scope="module")
def full(dataset: Path, killed: Left) -> Left:
    return _left(dataset, killed.out_dir, "init_from=resume", fault=("disk", 8, "checkpoints/6"))


@pytest.fixture(scope="module")
def finished(dataset: Path, full: Left) -> Left:
    return _left(dataset, full.out_dir, "init_from=resume")


def test_a_run_reports_every_step(straight: Path) -> None:
    lines = _metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert {"loss", "lr", "tokens_per_s", "grad_norm", "param_norm"} <= line.keys()
        assert np.isfinite(list(line.values())).all()
        assert line["tokens_per_s"] > 0
        assert line["tokens"] == line["step"] * 2 * 2 * 32
        assert ("val_loss" in line) == (line["step"] in {6, STEPS})
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == 0
    assert lines[2]["lr"] == pytest.approx(1e-2)


def test_sigterm_saves_says_so_and_exits_with_75(stopped: Left) -> None:
    process = stopped.process
    assert process.returncode == EXIT_AGAIN == 75
    step = stopped.latest
    assert step in {3, 4}
    assert stopped.steps == list(range(1, step + 1))
    assert process.stderr.splitlines()[-1].startswith(
        f"crystallm train: SIGTERM: stopped at step {step}, saved"
    )
    assert "Traceback" not in process.stderr


def test_sigkill_leaves_the_last_checkpoint(killed: Left) -> None:
    assert killed.process.returncode == -signal.SIGKILL
    assert killed.latest == 6
    assert killed.steps == list(range(1, 8))


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(full: Left) -> None:
    process = full.process
    assert process.returncode == 1
    assert full.latest == 6
    message = process.stderr.splitlines()[-1]
    assert message.startswith("crystallm train:"), process.stderr
    assert "could not be written" in message
    assert "step 6 is intact" in message
    assert "init_from=resume" in message
    assert "Traceback" not in process.stderr


def test_a_run_that_was_interrupted_ends_as_the_one_that_was_not(finished: Left, straight: Path) -> None:
    assert finished.process.returncode == 0, finished.process.stderr
    assert finished.steps == list(range(1, STEPS + 1))

    assert _learned(finished.out_dir) == _learned(straight)
    interrupted, uninterrupted = read_model(finished.out_dir), read_model(straight)
    assert interrupted.config == uninterrupted.config
    jax.tree.map(np.testing.assert_array_equal, interrupted.params, uninterrupted.params)
    config = load_config(TrainConfig, finished.out_dir / "config.yaml")
    # It says what the run began from, not that it was resumed.
    assert config == dataclasses.replace(TINY, dataset=config.dataset, out_dir=str(finished.out_dir))


def test_forty_steps_with_a_kill_in_the_eighteenth_are_those_of_an_undisturbed_run(
    dataset: Path, tmp_path: Path
) -> None:
    """The kill falls into a step of three micro-batches, with dropout and a moving average on."""
    whole, broken = (
        dataclasses.replace(
            TINY,
            dataset=str(dataset),
            out_dir=str(tmp_path / name),
            existing_run="resume",
            gradient_accumulation_steps=3,
            ema_decay=0.9,
            max_iters=40,
            lr_decay_iters=40,
            eval_interval=40,
            checkpoint_interval=17,
        )
        for name in ("whole", "broken")
    )
    run(whole)
    changed = {name: value for name, value in vars(broken).items() if value != getattr(TINY, name)}
    settings = [f"{name}={value}" for name, value in changed.items()]
    out_dir = Path(broken.out_dir)
    killed = _left(dataset, out_dir, *settings, fault=("in a step", 18, "checkpoints/17"))
    assert killed.process.returncode == -signal.SIGKILL, killed.process.stderr
    assert killed.latest == 17
    assert killed.steps in (list(range(1, 17)), list(range(1, 18)))
    run(broken)
    assert _learned(out_dir) == _learned(Path(whole.out_dir))
    assert _steps(out_dir) == list(range(1, 41))
    steps = compile_steps(whole, whole.model_config(371), make_mesh(1, 1, jax.devices()[:1]))
    states = []
    for folder in (out_dir, Path(whole.out_dir)):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            states.append(checkpoints.restore(steps.abstract).state)
    assert states[0].ema is not None
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    "changes", [{"windows": "packed", "block_size": 256}, {"underrep_p": 0.5}], ids=["packed", "mixed"]
)
def test_every_cut_goes_on_exactly_in_the_middle_of_an_epoch(
    changes: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (
        dataclasses.replace(TINY, dataset=str(dataset), out_dir=str(tmp_path / name), **changes)
        for name in ("whole", "broken")
    )
    run(whole)
    write = MetricsLog.write

    def write_and_stop(log: MetricsLog, **values: Any) -> None:
        write(log, **values)
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", write_and_stop)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run(broken)
    monkeypatch.setattr(MetricsLog, "write", write)
    assert _latest(tmp_path / "broken") in {3, 4}
    again = dataclasses.replace(broken, init_from="resume")
    run(again)
    losses = [[line["loss"] for line in _metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    jax.tree.map(
        np.testing.assert_array_equal,
        read_model(tmp_path / "broken").params,
        read_model(tmp_path / "whole").params,
    )
    _refused(DataError, dataclasses.replace(again, batch_size=4), "batch_size=2", "batch_size=4")


def _refused(error: type[CrystallmError], config: TrainConfig, *parts: str) -> None:
    with pytest.raises(error) as caught:
        run(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_folder_that_holds_a_run_is_not_begun_anew(straight: Path, dataset: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    again = dataclasses.replace(TINY, dataset=str(dataset), out_dir=str(straight))
    _refused(ConfigError, again, str(straight), f"step {STEPS}", "init_from=resume")
    assert (straight / "metrics.jsonl").read_text() == before
    assert _latest(straight) == STEPS


@pytest.mark.parametrize(
    ("key", "value"), [("n_embd", 32), ("n_layer", 2), ("n_head", 4), ("block_size", 16), ("bias", True)]
)
def test_a_resume_with_another_shape_is_refused_with_both(
    key: str, value: int, straight: Path, dataset: Path
) -> None:
    changed = dataclasses.replace(
        TINY, dataset=str(dataset), out_dir=str(straight), init_from="resume", **{key: value}
    )
    _refused(ModelError, changed, f"{key}={getattr(TINY, key)}", f"{key}={value}")
    assert load_config(TrainConfig, straight / "config.yaml").init_from == "scratch"


def test_what_is_not_there_is_refused(dataset: Path, tmp_path: Path) -> None:
    out_dir = str(tmp_path / "run")
    nowhere = dataclasses.replace(TINY, dataset=str(dataset), out_dir=out_dir, init_from="resume")
    _refused(ModelError, nowhere, out_dir, "no complete checkpoint")
    _refused(ModelError, dataclasses.replace(nowhere, init_from=str(tmp_path)), "no model there")
    _refused(
        CrystallmError, dataclasses.replace(nowhere, dataset=str(tmp_path / "none")), "no prepared folder"
    )
    _refused(ConfigError, dataclasses.replace(nowhere, dataset=""), "dataset is not set")
    long = dataclasses.replace(nowhere, init_from="scratch", block_size=10**6)
    _refused(CrystallmError, long, str(dataset), "fewer than one window")


def test_an_out_dir_that_is_a_file_is_refused(dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    _refused(CrystallmError, dataclasses.replace(TINY, dataset=str(dataset), out_dir=str(file)), str(file))


def test_a_finished_run_is_only_evaluated(straight: Path, dataset: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    config = dataclasses.replace(TINY, dataset=str(dataset), out_dir=str(straight), init_from="resume")
    result = run(config)
    assert result.step == STEPS
    assert result.val_loss == pytest.approx(_metrics(straight)[-1]["val_loss"], abs=1e-6)
    assert (straight / "metrics.jsonl").read_text() == before


def _evaluated(dataset: Path, source: Path, config: TrainConfig) -> float:
    """The validation loss of the weights at `source`, by hand."""
    weights = read_model(source)
    rows = open_rows(
        TokenStore.open(dataset, "val"),
        block_size=config.block_size,
        windows=config.windows,
        seed=config.seed,
    )
    # Row by row: neither the size of the batches nor what fills the last one shows.
    batches = list(
        evaluation_batches(
            rows, batch_size=1, count=config.eval_iters_val * config.batch_size, seed=config.seed
        )
    )
    loss = jax.jit(batch_loss, static_argnums=0)
    losses = [loss(weights.config, weights.params, batch) for batch in batches]
    return float(np.average(losses, weights=[batch.counted for batch in batches]))


# Of four records: a last batch that is not full, and rows of three records and of one.
@pytest.mark.parametrize(
    ("windows", "block_size", "batch_size"), [("starts", 40, 3), ("packed", 900, 1)], ids=["starts", "packed"]
)
def test_a_run_begins_with_the_weights_of_a_model_folder(
    windows: Any, block_size: int, batch_size: int, dataset: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(TINY, block_size=block_size).model_config(371)
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(model, jax.random.key(9)))
    write_folder(tmp_path / "model", Model(model, params))
    config = dataclasses.replace(
        TINY,
        dataset=str(dataset),
        out_dir=str(tmp_path / "run"),
        init_from=str(tmp_path / "model"),
        windows=windows,
        block_size=block_size,
        batch_size=batch_size,
        eval_only=True,
    )
    found = run(config).val_loss
    assert found == pytest.approx(_evaluated(dataset, tmp_path / "model", config), abs=1e-6)
    _refused(ModelError, dataclasses.replace(config, n_head=4), "n_head=2", "n_head=4")
    _refused(
        ModelError, dataclasses.replace(config, block_size=block_size + 1), f"block_size={block_size + 1}"
    )


def test_a_run_begins_with_the_weights_of_a_published_checkpoint(
    dataset: Path, golden: Path, tmp_path: Path
) -> None:
    source = golden / "model" / "c" / "ckpt.pt"
    config = dataclasses.replace(
        TINY,
        dataset=str(dataset),
        out_dir=str(tmp_path / "run"),
        init_from=str(source),
        n_layer=2,
        n_embd=32,
        block_size=64,
        eval_only=True,
    )
    assert run(config).val_loss == pytest.approx(_evaluated(dataset, source, config), abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(dataset: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY,
        dataset=str(dataset),
        out_dir=str(tmp_path),
        learning_rate=1e30,
        decay_lr=False,
        checkpoint_interval=1,
        validate=False,
    )
    # The first loss is finite, the parameters after it are not.
    _refused(ModelError, config, "step 1", "inf", "lower learning_rate and begin anew")
    assert _latest(tmp_path) is None


def test_a_line_that_a_kill_cut_short_and_those_that_are_redone_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    log = MetricsLog(path, first_step=4)
    log.write(step=4, loss=2.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl"}
    path.unlink()
    path.mkdir()  # as good as a full disk
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be written .* init_from=resume"):
        log.write(step=5, loss=1.0)
