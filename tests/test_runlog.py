"""What a run tells of itself: its lines, the trackers, the trace of some steps."""

import dataclasses
import itertools
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from crystallm_jax.errors import ConfigError
from crystallm_jax.model import flops_per_token
from crystallm_jax.train_run.metrics import read_metrics
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training import runlog
from crystallm_jax.training.runlog import RunLog

CONFIG = TrainConfig(
    gradient_accumulation_steps=2, batch_size=4, block_size=16, n_layer=1, n_head=2, n_embd=32, max_iters=40
)
MODEL = CONFIG.model_config(29)
NUM_PARAMS = 13_000
VALUES = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "skipped": 0, "data_wait_s": 0.25}


class Clock:
    """A clock that goes on a second a reading."""

    def __init__(self) -> None:
        self.readings = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self.readings))


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    # Measuring a CPU's would take longer than the tests.
    monkeypatch.setattr(runlog, "device_peak_flops", lambda dtype: 1e9)


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The package's messages come to caplog, whatever the command line did to its logger in other tests."""
    monkeypatch.setattr(logging.getLogger("crystallm_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "crystallm_jax")


def _config(out_dir: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, out_dir=str(out_dir), **changes)


def _log(config: TrainConfig, steps: range, *, writes: bool = True, **changes: float) -> None:
    """Log these steps as a session of the loop does."""
    with RunLog.opened(
        config, MODEL, num_params=NUM_PARAMS, first_step=steps.start - 1, writes=writes
    ) as log:
        for step in steps:
            log.step(step, VALUES | {"loss": float(step)} | changes, {})


def _lines(config: TrainConfig) -> list[dict[str, Any]]:
    return list(read_metrics(Path(config.out_dir) / "metrics.jsonl"))


def test_a_line_has_what_the_step_reports_and_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path)
    monkeypatch.setattr(runlog, "time", Clock())
    _log(config, range(1, 3))
    line = _lines(config)[1]
    assert line | VALUES | {"loss": 2.0, "step": 2, "tokens": 2 * 128} == line
    # The clock is read three times between the steps: for the elapsed time of the first, and by the second.
    assert line["step_time_s"] == 2
    assert line["tokens_per_s"] == 64
    assert line["data_wait_share"] == 0.125
    peak = 1e9 * jax.device_count()
    assert line["mfu"] == pytest.approx(64 * flops_per_token(MODEL, NUM_PARAMS) / peak, abs=1e-4)
    assert 0 < line["memory_bytes"] <= line["memory_peak_bytes"]
    assert line["elapsed_s"] > _lines(config)[0]["elapsed_s"]


def test_what_was_done_between_steps_is_left_out_of_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path)
    clock = Clock()
    monkeypatch.setattr(runlog, "time", clock)
    with RunLog.opened(config, MODEL, num_params=NUM_PARAMS, first_step=0) as log:
        for step in (1, 2):
            log.stop_clock()
            for _ in range(1000):
                clock.perf_counter()
            log.step(step, VALUES, {"val_loss": 3.0} if step == 1 else {})
            log.restart_clock()
    first, second = _lines(config)
    assert (first["val_loss"], "val_loss" in second) == (3.0, False)
    assert second["step_time_s"] == 1
    assert second["elapsed_s"] > 2000


def test_without_a_known_peak_there_is_no_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "device_peak_flops", lambda dtype: None)
    config = _config(tmp_path)
    _log(config, range(1, 2))
    assert "mfu" not in _lines(config)[0]
    assert _lines(config)[0]["tokens_per_s"] > 0


def test_lines_are_written_every_log_interval_and_after_evaluations(tmp_path: Path) -> None:
    config = _config(tmp_path, log_interval=4)
    with RunLog.opened(config, MODEL, num_params=NUM_PARAMS, first_step=0) as log:
        for step in range(1, 10):
            log.step(step, VALUES | {"loss": math.nan}, {"val_loss": 1.0} if step == 6 else {})
    assert [line["step"] for line in _lines(config)] == [4, 6, 8]
    assert _lines(config)[0]["loss"] is None  # JSON knows no NaN


def test_a_resumed_run_goes_on_with_its_time_and_writes_no_step_twice(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _log(config, range(1, 9))
    path = tmp_path / "metrics.jsonl"
    lines = _lines(config)
    lines[4]["elapsed_s"] = 5000.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    _log(config, range(6, 8))
    found = _lines(config)
    assert [line["step"] for line in found] == list(range(1, 8))
    assert found[:5] == lines[:5]
    assert all(line["elapsed_s"] >= 5000 for line in found[5:])


def test_where_another_process_writes_the_log_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path / "run", tensorboard=True, wandb=True, profile_steps=2)
    with RunLog.opened(config, MODEL, num_params=NUM_PARAMS, first_step=0, writes=False) as log:
        for step in range(1, 15):
            log.step(step, VALUES, {"val_loss": 1.0})
            log.restart_clock()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = _config(tmp_path, tensorboard=True)
    _log(config, range(1, 9))
    _log(config, range(6, 11), loss=7.0)
    scalars = _scalars(tmp_path / "tensorboard")
    assert scalars["loss"] == [(step, float(step) if step < 6 else 7.0) for step in range(1, 11)]
    assert scalars.keys() >= {"lr", "grad_norm", "tokens_per_s", "mfu", "memory_peak_bytes"}


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard", "wandb"):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"pip install 'crystallm-jax\[{package}\]'") as caught:
            _log(_config(tmp_path, **{package: True}), range(1, 2))
        assert "\n" not in str(caught.value)


class FakeService(ModuleType):
    """As much of Weights & Biases as is used: it keeps each step once, the first time it comes."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.asked: list[dict[str, Any]] = []
        self.fails_at: int | None = None
        self.finished = 0

    def init(self, **asked: Any) -> SimpleNamespace:
        self.asked.append(asked)
        history = self.runs.setdefault(asked["id"], {})

        def log(values: dict[str, float], *, step: int) -> None:
            if step == self.fails_at:
                raise OSError("the network\nis down")
            assert step not in history
            history[step] = values

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(starting_step=max(history, default=-1) + 1, log=log, finish=finish)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    fake = FakeService()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, service: FakeService) -> None:
    config = _config(tmp_path, wandb=True, wandb_project="mine")
    _log(config, range(1, 9))
    _log(config, range(6, 11), loss=7.0)
    assert len(service.runs) == 1
    history = next(iter(service.runs.values()))
    assert {step: values["loss"] for step, values in history.items()} == {
        **{step: float(step) for step in range(1, 9)},
        **dict.fromkeys((9, 10), 7.0),
    }
    assert [asked["project"] for asked in service.asked] == ["mine", "mine"]
    assert service.asked[0]["config"]["n_embd"] == 32
    assert service.finished == 2


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.fails_at = 4
    config = _config(tmp_path, wandb=True)
    _log(config, range(1, 8))
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (the network is down): the run goes on without it, metrics.jsonl has all figures"
    ]
    assert list(next(iter(service.runs.values()))) == [1, 2, 3]
    assert len(_lines(config)) == 7


def test_a_service_that_refuses_a_run_ends_it_before_it_begins_but_not_when_it_is_resumed(
    tmp_path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**asked: Any) -> None:
        raise RuntimeError("api_key not\nconfigured")

    monkeypatch.setattr(service, "init", refuse, raising=False)
    with pytest.raises(ConfigError, match=r"wandb=true: .* \(api_key not configured\); log in"):
        _log(_config(tmp_path, wandb=True), range(1, 2))
    _log(_config(tmp_path, wandb=True), range(4, 6))
    assert "api_key not configured" in caplog.text
    assert [line["step"] for line in _lines(_config(tmp_path))] == [4, 5]


def _train(config: TrainConfig, steps: range) -> None:
    """A session whose steps do something on the device, reported one late."""
    work = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    with RunLog.opened(config, MODEL, num_params=NUM_PARAMS, first_step=steps.start - 1) as log:
        for step in steps:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                x = work(x)
            if step > steps.start:
                log.step(step - 1, VALUES, {})
        log.step(steps.stop - 1, VALUES, {})


def test_steps_from_the_tenth_on_are_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config(tmp_path, profile_steps=3)
    _train(config, range(21, 41))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert f"a trace of 3 steps from step 30 on is in {tmp_path / 'profile'}" in caplog.text
    assert "xprof --logdir" in caplog.text
    unknown = [line["step"] for line in _lines(config) if line["tokens_per_s"] is None]
    assert unknown == [29, 33]  # while the trace was begun and written


def test_a_trace_under_way_is_written_when_the_run_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train(_config(tmp_path, profile_steps=500), range(1, 13))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert "a trace of 3 steps from step 10 on" in caplog.text


def test_a_run_that_ends_before_anything_is_traced_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train(_config(tmp_path, profile_steps=2), range(1, 6))
    assert "no trace was written, the run ended before its step 10" in caplog.text
    assert not (tmp_path / "profile").exists()
