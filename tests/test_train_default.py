"""The run of the model in the package: begun, held, stopped and gone on with, and what it refuses."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.config import load_config
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.errors import DataError
from crystallm_jax.models.kinds import read_model
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training import runlog

ROOT = Path(__file__).parents[1]
TINY = (
    "n_layer=1",
    "n_head=2",
    "n_embd=16",
    "block_size=64",
    "batch_size=2",
    "eval_iters_val=1",
    "warmup_iters=2",
    "optimizer=adamw",  # compiles faster than muon
)
POLITENESS = 3


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first crystals of the embedded corpus, prepared."""
    folder = tmp_path_factory.mktemp("data") / "crystals"
    tokenizer = CIFTokenizer()
    with StoreWriter(folder) as out:
        for i, record in enumerate(itertools.islice(read_corpus(), 24)):
            tokens = tokenizer.encode_cif(stream_text(preprocess_cif(record.text)))
            out.add(record.id, tokens, split="train" if i < 20 else "val")
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def _start(dataset: Path, out_dir: Path, *settings: str) -> subprocess.Popen[str]:
    names = ("PATH", "HOME", "TMPDIR")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    return subprocess.Popen(
        [
            *(sys.executable, "tools/train_default.py", "--dataset", dataset, "--out-dir", out_dir),
            *("--nice", str(POLITENESS), *TINY, *settings),
        ],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _steps(out_dir: Path) -> list[int]:
    path = out_dir / "metrics.jsonl"
    # A line may be half written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def _wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    while not until():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def _state(process: subprocess.Popen[str]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def _contents(folder: Path) -> Mapping[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was held, let go on, and stopped by SIGTERM."""
    out_dir = tmp_path_factory.mktemp("runs") / "default"
    process = _start(dataset, out_dir, "dtype=float32")
    try:
        _wait(process, lambda: len(_steps(out_dir)) > 2)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + POLITENESS
        if sys.platform == "linux":
            process.send_signal(signal.SIGSTOP)
            _wait(process, lambda: _state(process) == "T")
            held = _steps(out_dir)
            time.sleep(0.3)
            assert _steps(out_dir) == held
            process.send_signal(signal.SIGCONT)
            _wait(process, lambda: len(_steps(out_dir)) > len(held) + 1)
        assert f"process {process.pid} " in (out_dir / ".lock").read_text()
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, printed
    assert f"process {process.pid}: kill -STOP holds it" in printed
    assert "begun from scratch: the model in the package has n_layer=" in printed
    assert f"SIGTERM: stopped at step {_steps(out_dir)[-1]}, saved" in printed
    assert (out_dir / "checkpoints" / str(_steps(out_dir)[-1])).is_dir()
    return out_dir


def test_it_goes_on_in_the_faster_arithmetic(
    stopped: Path,
    dataset: Path,
    tool: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Measured for utilisation, which takes seconds.
    monkeypatch.setattr(runlog, "device_peak_flops", lambda _: None)
    before = _steps(stopped)
    last = before[-1] + 2
    arguments = [
        "--dataset",
        str(dataset),
        "--out-dir",
        str(stopped),
        "--nice",
        "0",
        *TINY,
        f"max_iters={last}",
    ]
    assert tool("train_default").main(arguments) == 0
    assert _steps(stopped) == [*before, last - 1, last] == list(range(1, last + 1))
    told = capfd.readouterr().err
    chosen = next(line for line in told.splitlines() if "tokens/s, bfloat16" in line).split()[-3]
    assert load_config(TrainConfig, stopped / "config.yaml").dtype == chosen
    assert load_config(TrainConfig, stopped / "config.yaml").init_from == "scratch"


@pytest.mark.parametrize("setting", ["n_embd=32", "block_size=32", "n_layer=2"])
def test_a_run_of_another_shape_is_refused_and_stays(
    setting: str,
    stopped: Path,
    dataset: Path,
    tool: Callable[[str], ModuleType],
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = _contents(stopped)
    arguments = ["--dataset", str(dataset), "--out-dir", str(stopped), "--nice", "0", *TINY, setting]
    assert tool("train_default").main(arguments) == 1
    assert _contents(stopped) == before
    name, value = setting.split("=")
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2  # how to hold it, and why not
    assert told[1].startswith(f"train_default: {stopped}: its model has {name}=")
    assert f"not {value}" in told[1]


def test_two_at_once_are_refused(
    stopped: Path, dataset: Path, tool: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    from crystallm_jax.train_run.lock import sole_run

    arguments = ["--dataset", str(dataset), "--out-dir", str(stopped), "--nice", "0", *TINY, "dtype=float32"]
    with sole_run(stopped):
        before = _contents(stopped)
        assert tool("train_default").main(arguments) == 2
        assert _contents(stopped) == before
    assert f"a run is under way there (process {os.getpid()} " in capfd.readouterr().err


def test_without_crystals_it_says_how_to_get_them(
    tmp_path: Path, tool: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    prepared, out_dir = tmp_path / "prepared", tmp_path / "run"
    arguments = ["--data", str(tmp_path / "raw"), "--dataset", str(prepared), "--out-dir", str(out_dir)]
    assert tool("train_default").main([*arguments, "--nice", "0"]) == 1
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[1].startswith(
        f"train_default: {prepared} is not prepared, and {tmp_path / 'raw'} has no train.csv"
    )
    assert "columns material_id and cif" in told[1]
    assert f"crystallm prepare FILE --split --dedup --out {prepared}" in told[1]
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_begins_from_is_a_flag(
    tool: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    assert tool("train_default").main(["--nice", "0", "init_from=resume"]) == 2
    assert "init_from=resume: say --init-from" in capfd.readouterr().err


def test_it_stands_behind_all_others(tool: Callable[[str], ModuleType]) -> None:
    assert tool("train_default").parse([]).nice == 19


def test_crystals_are_prepared_where_they_are_not(
    tmp_path: Path, tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tool("default_data")
    given: list[list[str]] = []
    monkeypatch.setattr(data, "crystallm", lambda arguments: given.append(arguments) or 7)
    raw = tmp_path / "raw"
    raw.mkdir()
    wanted = data.RawData(str(raw), tmp_path / "prepared", ("--dedup",))
    (raw / "train.csv.xz").touch()
    (raw / "val.csv").touch()
    with pytest.raises(DataError, match=r"has no test\.csv \("):
        data.prepare_where_needed(wanted)
    (raw / "test.csv.gz").touch()
    assert data.prepare_where_needed(wanted) == 7
    sets = [str(raw / "train.csv.xz"), "--val", str(raw / "val.csv"), "--test", str(raw / "test.csv.gz")]
    assert given == [["prepare", *sets, "--dedup", "--out", str(tmp_path / "prepared")]]
    # A preparation that was stopped has its work folder alone, and goes on.
    (tmp_path / "prepared" / ".prepare").mkdir(parents=True)
    assert data.prepare_where_needed(wanted) == 7
    (tmp_path / "prepared" / "meta.json").touch()
    assert data.prepare_where_needed(wanted) == 0
    assert len(given) == 2


def test_the_corpus_in_the_package_is_prepared_as_training_does(
    tmp_path: Path, tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tool("default_data")
    given: list[list[str]] = []
    monkeypatch.setattr(data, "crystallm", lambda arguments: given.append(arguments) or 75)
    assert (
        tool("train_default").main(["--dataset", "embedded", "--out-dir", str(tmp_path), "--nice", "0"]) == 75
    )
    assert given == [["prepare", "embedded", "--split", "0.04,0.03", "--out", str(tmp_path / "dataset")]]


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"), [(2.0, 1.0, "float32"), (1.0, 2.0, "bfloat16"), (1.0, 1.0, "float32")]
)
def test_the_faster_arithmetic_is_taken(
    float32: float, bfloat16: float, chosen: str, tool: Callable[[str], ModuleType]
) -> None:
    assert tool("default_dtype").faster({"float32": float32, "bfloat16": bfloat16}) == chosen


def test_a_signal_while_arithmetics_are_timed_ends_it(
    dataset: Path, tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timing = tool("default_dtype")

    def stepper(*_: object) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(timing, "_stepper", stepper)
    arguments = ["--dataset", str(dataset), "--out-dir", str(tmp_path / "run"), "--nice", "0", *TINY]
    assert tool("train_default").main(arguments) == 75
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_new_run_begins_from_the_model_in_the_package_where_it_fits(
    dataset: Path, tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    shipped = read_model("default").config
    shape = {name: getattr(shipped, name) for name in ("n_layer", "n_head", "n_embd", "bias")}
    begin = tool("train_default").begin
    out_dir = str(tmp_path / "run")
    cropped = TrainConfig(**shape, block_size=shipped.block_size // 2, out_dir=out_dir)
    assert begin(cropped, dataset, None) == "default"
    origin = tool("default_origin").read_origin(tmp_path / "run")
    assert origin.init_from == "default"
    assert "Materials Project" in origin.data
    longer = TrainConfig(**shape, block_size=shipped.block_size * 2, out_dir=out_dir)
    assert begin(longer, dataset, None) == "scratch"
    assert tool("default_origin").read_origin(tmp_path / "run").init_from == "scratch"


def test_tokens_are_counted_from_model_to_model(
    stopped: Path, tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    origins = tool("default_origin")
    own = _steps(stopped)[-1] * 2 * 64
    assert origins.origin_of(str(stopped)).tokens == own
    before = (stopped / "origin.json").read_bytes()
    origins.write_origin(stopped, origins.Origin("older", 1000, "other crystals"))
    found = origins.origin_of(str(stopped))
    (stopped / "origin.json").write_bytes(before)
    assert (found.tokens, found.init_from) == (own + 1000, "default")
    assert found.data.endswith("; other crystals")
