"""Where records are prepared makes no difference to what comes out: a Ray cluster of two workers."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing import executors
from crystallm_jax.data.preparing.executors import Execution, _Workers
from crystallm_jax.data.preparing.pipeline import Prepared, Recipe
from crystallm_jax.data.record import Record
from crystallm_jax.errors import DataError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_a_ray_cluster_of_two_workers_gives_the_same_bytes(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    hang = (fixtures / "data" / "rocksalt.cif").read_text()
    source = tmp_path / "more.jsonl"
    rows = [{"id": f"salt-{i}", "cif": hang.replace("3.98800000", f"{3.5 + i / 50:.8f}")} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad", "cif": "?"}]))
    inputs = [fixtures / "data", source]
    alone = prepare(inputs, tmp_path / "alone", execution=Execution(workers=0), progress=False)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        spread = prepare(inputs, tmp_path / "ray", execution=Execution(executor="ray"), progress=False)
    finally:
        ray.shutdown()
    assert spread.n_kept == alone.n_kept == 45
    assert dict(spread.reasons) == dict(alone.reasons)
    for name in ("train.bin", "train.starts.npy", "train.ids.txt", "dropped.csv", "meta.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_ray_that_is_not_installed_is_one_line(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'crystallm-jax\[ray\]'"):
        prepare([fixtures / "data"], tmp_path / "out", execution=Execution(executor="ray"), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_ray_cluster_that_does_not_answer_is_one_line(fixtures: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    away = Execution(executor="ray", ray_address="127.0.0.1:1")
    with pytest.raises(DataError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        prepare([fixtures / "data"], tmp_path / "out", execution=away, progress=False)


def test_a_record_whose_worker_is_killed_is_done_again(fixtures: Path) -> None:
    batch = (Record("salt", (fixtures / "data" / "rocksalt.cif").read_text()),)
    workers = _Workers(Recipe(), workers=1, time_limit=60.0)
    try:
        for _ in range(2):  # while the worker starts, and after that
            ticket = workers.submit(batch)
            os.kill(_worker_of(workers), signal.SIGKILL)
            (outcome,) = workers.settle(batch, ticket)
            assert isinstance(outcome, Prepared)
    finally:
        workers.close()


def _worker_of(workers: _Workers) -> int:
    manager = workers._pool._pool_manager.worker_manager
    while not manager.workers:
        time.sleep(0.01)
    return next(iter(manager.workers))


def test_texts_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_MOST_CHARACTERS", 100)
    waiting: list[int] = []

    def submit(batch: executors.Batch) -> None:
        waiting.append(len(batch[0].text))
        assert sum(waiting) <= 100 + 60

    def settle(batch: executors.Batch, _: None) -> list[executors.Outcome]:
        waiting.remove(len(batch[0].text))
        return []

    batches = ((Record(str(i), "x" * (60 if i % 3 else 1)),) for i in range(40))
    done = list(executors._in_order(batches, submit=submit, settle=settle, workers=8))
    assert [batch[0].id for batch, _ in done] == [str(i) for i in range(40)]
