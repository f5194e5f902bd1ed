"""A preparation that is killed goes on where it was, and ends with the bytes of one that was not."""

import csv
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from crystallm_jax.data.prepare import WORK_FOLDER, prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import Split

RECORDS = 420
SELECTION = Selection(dedup=True, split=Split(0.2, 0.1), shuffle=True, underrepresented_below=100)
# Small commits, so that a kill finds some of them. A background job starts with SIGINT ignored.
SCRIPT = """
import signal, sys
from crystallm_jax.data import prepare as module
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import Split
from crystallm_jax.signals import StoppedError
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module._COMMIT_RECORDS = 48
    selection = Selection(dedup=True, split=Split(0.2, 0.1), shuffle=True, underrepresented_below=100)
    try:
        report = module.prepare(
            [sys.argv[1]], sys.argv[2], selection=selection, execution=Execution(workers=int(sys.argv[3]))
        )
    except StoppedError as error:
        sys.exit(error.exit_code)
    print("resumed at", report.resumed_at)
"""


@pytest.fixture(scope="module")
def source(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rock salt and perovskites of many lattice constants, with rows that cannot be kept among them."""
    salt = (fixtures / "data" / "rocksalt.cif").read_text()
    perovskite = (fixtures / "data" / "perovskite.cif").read_text()
    path = tmp_path_factory.mktemp("source") / "x.csv"
    metals = ["Li", "Na", "K", "Rb", "Cs", "Ag", "Cu", "Tl"]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("id", "cif"))
        for i in range(RECORDS):
            cif = salt.replace("3.98800000", f"{3 + i / 500:.8f}").replace("Na", metals[i % len(metals)])
            if i % 50 == 7:
                cif = perovskite
            if i % 60 == 11:
                cif = "no crystal"
            writer.writerow((f"crystal-{i % 390}", cif))
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run gives that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare([source], out, selection=SELECTION, execution=Execution(workers=0), progress=False)
    return _contents(out)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _start(folder: Path, source: Path, workers: int) -> subprocess.Popen:
    script = folder / "run.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [sys.executable, script, source, folder / "out", str(workers)]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _done(folder: Path) -> int:
    """Records in the catalogue of a run under way, read without disturbing it."""
    path = folder / "out" / WORK_FOLDER / "catalogue.sqlite"
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as connection:
            return connection.execute("SELECT COUNT(*) FROM records").fetchone()[0]
    except sqlite3.DatabaseError:  # in the middle of a transaction
        return 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    rng = random.Random(20230610)
    steps = []
    for target in (1, 100, 250):
        process = _start(tmp_path, source, workers=rng.choice([0, 1, 2]))
        deadline = time.monotonic() + 120
        while _done(tmp_path) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() / 20)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        steps.append(_done(tmp_path))
        assert not (tmp_path / "out" / "train.bin").exists()
    assert 0 < steps[0] <= steps[1] <= steps[2] <= RECORDS
    assert steps[2] > steps[0]
    process = _start(tmp_path, source, workers=1)
    printed, _ = process.communicate(timeout=120)
    assert printed.decode().strip() == f"resumed at {steps[2]}"
    assert _contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_keeps_what_is_done(
    source: Path, whole: dict[str, bytes], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = _start(tmp_path, source, workers=1)
    deadline = time.monotonic() + 120
    while _done(tmp_path) < 48 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {WORK_FOLDER}
    done = _done(tmp_path)
    report = prepare(
        [source], tmp_path / "out", selection=SELECTION, execution=Execution(workers=0), progress=False
    )
    assert report.resumed_at == done > 0
    assert _contents(tmp_path / "out") == whole


def test_another_split_of_the_same_records_redoes_nothing(source: Path, tmp_path: Path) -> None:
    alone = {"execution": Execution(workers=0), "progress": False}
    with pytest.raises(Exception, match="cannot be split"):
        prepare([source], tmp_path / "out", selection=Selection(split=Split(10_000, 1)), **alone)
    report = prepare([source], tmp_path / "out", selection=Selection(split=Split(0.1, 0.1)), **alone)
    assert report.resumed_at == RECORDS


def test_changed_inputs_begin_anew(source: Path, tmp_path: Path) -> None:
    alone = {"execution": Execution(workers=0), "progress": False}
    copy = tmp_path / "x.csv"
    copy.write_bytes(source.read_bytes())
    with pytest.raises(Exception, match="cannot be split"):
        prepare([copy], tmp_path / "out", selection=Selection(split=Split(10_000, 1)), **alone)
    copy.write_bytes(source.read_bytes() + b"one-more,no crystal\r\n")
    report = prepare([copy], tmp_path / "out", **alone)
    assert report.resumed_at == 0
    assert report.n_input == RECORDS + 1
