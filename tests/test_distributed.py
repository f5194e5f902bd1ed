"""Several processes as one run: how they join, stop, die and part, and that what they saved goes on anywhere."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.config import load_config
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.rows import evaluation_batches, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.hosts.distributed import LateMaximum, Share, batch_share, join
from crystallm_jax.signals import EXIT_AGAIN
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.loop import run

ROOT = Path(__file__).parents[1]
DEVICES = 4
STEPS = 12
# Sums over devices are in another order where they cross processes.
TOLERANCE = 2e-5
CONFIG = TrainConfig(
    eval_interval=6,
    checkpoint_interval=6,
    eval_iters_train=1,
    eval_iters_val=2,
    validate=True,
    gradient_accumulation_steps=2,
    batch_size=8,
    block_size=24,
    windows="packed",
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

# Runs the command line; at the given step, once a path exists, the process of the given number sends itself the signal.
_PROCESS = """
import os, signal, sys, time
from pathlib import Path
import jax
from crystallm_jax.cli import main
from crystallm_jax.hosts import distributed
from crystallm_jax.signals import StopRequest

distributed.HEARTBEAT_TIMEOUT_S = 4
fault, process, at, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
agreed, calls = StopRequest.agreed, 0

def agreed_and_fail(request):
    global calls
    calls += 1
    if calls == at and jax.process_index() == process:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[fault])
    return agreed(request)

StopRequest.agreed = agreed_and_fail
sys.exit(main(["train", *sys.argv[5:]]))
"""

# The same run in three sittings, each on another number of devices, split in another way.
_MESHES = """
import dataclasses, sys
import jax
from crystallm_jax.config import load_config
from crystallm_jax.training import loop
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.sharding import make_mesh

config = load_config(TrainConfig, None, sys.argv[1:])
for devices, until, fsdp, tensor in ((8, 4, 2, 2), (1, 8, 1, 1), (4, 12, 4, 1)):
    loop.make_mesh = lambda data, fsdp, tensor: make_mesh(data, fsdp, jax.devices()[:devices], tensor=tensor)
    changes = {"max_iters": until, "fsdp": fsdp, "tensor": tensor, "existing_run": "resume"}
    loop.run(dataclasses.replace(config, **changes))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    data_id = CIFTokenizer().token_to_id["data_"]
    rng = np.random.default_rng(0)
    with StoreWriter(folder) as out:
        for i in range(80):
            tokens = np.concatenate([[data_id], rng.integers(0, data_id, 5 + i % 9)])
            out.add(str(i), tokens, split="train" if i < 60 else "val")
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def _environment(devices: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def _settings(config: TrainConfig) -> list[str]:
    values = dataclasses.asdict(config)
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


class Ended(NamedTuple):
    code: int
    output: str
    error: str


def _together(config: TrainConfig, fault: str, *, process: int, at: int, path: str = ".") -> list[Ended]:
    """Two processes of the command line that train together, one of which is struck."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    processes = []
    for number in range(2):
        own = dataclasses.replace(config, coordinator_address=address, num_processes=2, process_id=number)
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _PROCESS,
                    fault,
                    str(process),
                    str(at),
                    f"{config.out_dir}/{path}",
                    *_settings(own),
                ],
                cwd=ROOT,
                env=_environment(DEVICES // 2),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        ended = [started.communicate(timeout=200) for started in processes]
    finally:
        for started in processes:
            started.kill()
    return [Ended(started.returncode, *texts) for started, texts in zip(processes, ended, strict=True)]


def _metrics(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def _checkpoints(out_dir: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (out_dir / "checkpoints").iterdir() if folder.name.isdigit())


def _assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert ("val_loss" in one) == ("val_loss" in other)
        for name in {"loss", "grad_norm", "train_loss", "val_loss"} & other.keys():
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=TOLERANCE, err_msg=str(other))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process on one device writes, undisturbed."""
    out_dir = tmp_path_factory.mktemp("alone")
    run(dataclasses.replace(CONFIG, dataset=str(dataset), out_dir=str(out_dir)))
    return _metrics(out_dir)


# One run of two processes: stopped, gone on with by two and struck dead, and gone on with by one.


@pytest.fixture(scope="module")
def shared(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    out_dir = tmp_path_factory.mktemp("together") / "run"
    return dataclasses.replace(
        CONFIG, dataset=str(dataset), out_dir=str(out_dir), existing_run="resume", fsdp=2
    )


@pytest.fixture(scope="module")
def stopped(shared: TrainConfig) -> tuple[list[Ended], list[int], list[dict[str, Any]]]:
    ended = _together(shared, "SIGTERM", process=1, at=3)
    return ended, _checkpoints(Path(shared.out_dir)), _metrics(Path(shared.out_dir))


@pytest.fixture(scope="module")
def killed(
    shared: TrainConfig, stopped: tuple[list[Ended], list[int], list[dict[str, Any]]]
) -> tuple[list[Ended], list[int]]:
    assert stopped[1] == [4]
    # Its fifth step from there is the ninth.
    ended = _together(shared, "SIGKILL", process=1, at=5, path="checkpoints/6")
    return ended, _checkpoints(Path(shared.out_dir))


def test_sigterm_to_one_process_stops_all_at_the_same_step(
    stopped: tuple[list[Ended], list[int], list[dict[str, Any]]],
) -> None:
    ended, checkpoints, lines = stopped
    for process in ended:
        assert process.code == EXIT_AGAIN == 75, process.error
        assert "SIGTERM: stopped at step 4, saved" in process.error
        assert "Traceback" not in process.error
    assert checkpoints == [4]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_process_0_alone_speaks_and_nobody_writes_who_took_part(
    shared: TrainConfig, stopped: tuple[list[Ended], list[int], list[dict[str, Any]]]
) -> None:
    first, second = (process.error for process in stopped[0])
    assert "the settings: process 0 of 2" in first
    assert "training records" in first
    assert "the settings" not in second
    assert "training records" not in second
    config = load_config(TrainConfig, Path(shared.out_dir) / "config.yaml")
    assert config == dataclasses.replace(shared, process_id=None)


def test_a_process_that_is_killed_ends_the_others(killed: tuple[list[Ended], list[int]]) -> None:
    (survivor, struck), checkpoints = killed
    assert struck.code == -signal.SIGKILL
    assert survivor.code in {EXIT_AGAIN, -signal.SIGABRT}, survivor.error
    assert "has lost another" in survivor.error or "another task died" in survivor.error
    assert checkpoints == [4, 6]


def test_two_processes_and_then_one_end_as_one_that_nothing_befell(
    shared: TrainConfig, killed: tuple[list[Ended], list[int]], alone: list[dict[str, Any]]
) -> None:
    assert killed[1][-1] == 6
    run(dataclasses.replace(shared, fsdp=1))
    _assert_same_run(_metrics(Path(shared.out_dir)), alone)


def test_checkpoints_go_on_on_other_meshes(
    dataset: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = dataclasses.replace(
        CONFIG, dataset=str(dataset), out_dir=str(tmp_path / "run"), validate=False, eval_iters_train=0
    )
    done = subprocess.run(
        [sys.executable, "-c", _MESHES, *_settings(config)],
        cwd=ROOT,
        env=_environment(8),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = _metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = ("loss", "grad_norm")
    for one, other in zip(lines, alone, strict=True):
        found, expected = ([line[name] for name in names] for line in (one, other))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_joining_too_late_or_with_nobody_is_refused_in_one_line() -> None:
    jax.devices()
    with pytest.raises(
        ConfigError, match=r"cannot join other processes \(distributed=on\): .*distributed=off"
    ):
        join(TrainConfig(distributed="on"))
    join(TrainConfig(distributed="off"))


def test_one_process_reads_whole_batches() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert batch_share(NamedSharding(mesh, PartitionSpec("data", None)), 8) == Share(0, 1)


@pytest.mark.parametrize("windows", ["starts", "packed"])
def test_the_hosts_parts_of_evaluation_batches_are_those_of_one(windows: Any, dataset: Path) -> None:
    rows = open_rows(TokenStore.open(dataset, "val"), block_size=24, windows=windows, seed=0)
    # The last batch is not full.
    cut = {"batch_size": 8, "count": 3, "seed": 1}
    whole = list(evaluation_batches(rows, **cut))
    parts = [list(evaluation_batches(rows, **cut, host=host, hosts=2)) for host in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, *shares in zip(whole, *parts, strict=True):
        jax.tree.map(
            lambda leaf, *own: np.testing.assert_array_equal(np.concatenate(own), leaf), batch, *shares
        )
    assert any(batch.counted < batch.tokens[:, 1:].size for batch in whole)
    with pytest.raises(DataError, match="does not divide over 3 hosts"):
        next(evaluation_batches(rows, **cut, host=0, hosts=3))


class _Device(NamedTuple):
    process_index: int


class _Sharding(NamedTuple):
    """Rows by device, as a sharding tells them."""

    rows: list[tuple[int, slice]]

    def devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, tuple[slice, slice]]:
        assert len(shape) == 2
        return {(_Device(process)): (rows, slice(None)) for process, rows in self.rows}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, slice(0, 4)), (1, slice(4, 8))], Share(0, 2)),
        ([(1, slice(0, 4)), (0, slice(4, 8))], Share(1, 2)),
        # One tensor axis across both.
        ([(0, slice(None)), (1, slice(None))], Share(0, 1)),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same(
    rows: list[tuple[int, slice]], expected: Share
) -> None:
    assert batch_share(_Sharding(rows), 8) == expected  # type: ignore[arg-type]


def test_processes_whose_rows_overlap_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot share batches evenly"):
        batch_share(_Sharding([(0, slice(0, 6)), (1, slice(4, 8))]), 8)  # type: ignore[arg-type]


def test_the_greatest_number_is_told_one_call_late() -> None:
    greatest = LateMaximum(Mesh(np.array(jax.devices()), ("data",)))
    assert [greatest(number) for number in (3, 0, 15, 0)] == [0, 3, 0, 15]
