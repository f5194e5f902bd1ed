"""Sampling by two processes: disjoint prompts, one folder, the files of one process; and what a killed one leaves."""

import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.cli import main
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import write_folder
from crystallm_jax.signals import EXIT_AGAIN

ROOT = Path(__file__).parents[1]
SAMPLES = (
    "--num-samples",
    "3",
    "--batch-size",
    "4",
    "--seed",
    "5",
    "--workers",
    "1",
    "--max-new-tokens",
    "12",
)
# Runs the command line; the process of the given number dies when it has written so many CIFs.
_PROCESS = """
import os, signal, sys
from pathlib import Path
import jax
from crystallm_jax.cli import main
from crystallm_jax.sample_run.run_folder import ResultsFolder
from crystallm_jax.hosts import distributed

distributed.HEARTBEAT_TIMEOUT_S = 4
fault, dies, after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
append, entries = ResultsFolder.append, 0

def append_and_die(folder, entry):
    global entries
    append(folder, entry)
    entries += 1
    if folder.part == dies and entries == after:
        os.kill(os.getpid(), signal.Signals[fault])

ResultsFolder.append = append_and_die
if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[4:]]))
"""


class Ended(NamedTuple):
    code: int
    output: str
    error: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a tiny model and of five prompts, three of them the same, which both processes have."""
    folder = tmp_path_factory.mktemp("inputs")
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=CIFTokenizer().vocab_size, dtype="float32"
    )
    write_folder(folder / "model", Model(config, init_params(config, jax.random.key(0))))
    table = folder / "prompts.csv"
    table.write_text("formula,z\nNaCl,4\nNaCl,4\nTiO2,2\nNaCl,4\nKBr,4\n")
    (folder / "process.py").write_text(_PROCESS)
    return ["--model", str(folder / "model"), "--prompts", str(table), *SAMPLES]


def _together(
    flags: list[str], out: Path, *, fault: str = "SIGKILL", dies: int = -1, after: int = 0
) -> list[Ended]:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    script = Path(flags[flags.index("--prompts") + 1]).parent / "process.py"
    command = [sys.executable, str(script), fault, str(dies), str(after), *flags, "--out", str(out)]
    processes = [
        subprocess.Popen(
            [*command, "--coordinator-address", address, "--num-processes", "2", "--process-id", str(number)],
            cwd=ROOT,
            env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        ended = [started.communicate(timeout=150) for started in processes]
    finally:
        for started in processes:
            started.kill()
    return [Ended(one.returncode, *texts) for one, texts in zip(processes, ended, strict=True)]


def _files(out: Path) -> dict[str, str]:
    """All that a run leaves, but for how long it took and run.json, which has little else."""
    files = {
        str(path.relative_to(out)): path.read_text()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "samples.csv")
    }
    with (out / "samples.csv").open(newline="") as file:
        rows = [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]
    return files | {"samples.csv": str(rows)}


@pytest.fixture(scope="module")
def killed(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    out = tmp_path_factory.mktemp("together") / "out"
    return out, _together(inputs, out, dies=1, after=2)


def test_a_process_that_is_told_to_stop_ends_the_other(inputs: list[str], tmp_path: Path) -> None:
    survivor, told = _together(inputs, tmp_path / "out", fault="SIGTERM", dies=1, after=2)
    assert told.code == EXIT_AGAIN, told.error
    assert "crystallm sample: interrupted" in told.error
    assert survivor.code in {EXIT_AGAIN, -signal.SIGABRT}, survivor.error
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_process_that_is_killed_ends_the_other(killed: tuple[Path, list[Ended]]) -> None:
    out, (survivor, struck) = killed
    assert struck.code == -signal.SIGKILL
    assert survivor.code in {EXIT_AGAIN, -signal.SIGABRT}, survivor.error
    assert "has lost another" in survivor.error or "another task died" in survivor.error
    assert not (out / "run.json").exists()
    assert sorted(path.name for path in out.glob("journal-*")) == ["journal-0.jsonl", "journal-1.jsonl"]


def test_two_processes_leave_the_files_of_one(
    inputs: list[str], killed: tuple[Path, list[Ended]], tmp_path: Path
) -> None:
    ended = _together([*inputs, "--resume"], killed[0])
    assert [process.code for process in ended] == [0, 0], ended
    assert "15 samples" in ended[0].output
    assert "15 samples" not in ended[1].output
    assert main(["sample", *inputs, "--out", str(tmp_path / "alone")]) == 0
    assert _files(killed[0]) == _files(tmp_path / "alone")
