"""`crystallm info` of a run folder: what is said of finished, running, young and damaged runs, and the curves."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystallm_jax.cli import main
from crystallm_jax.cli.run_info import report
from crystallm_jax.cli.run_plot import averaged, curve
from crystallm_jax.config import to_yaml
from crystallm_jax.train_run.names import is_run
from crystallm_jax.train_run.status import describe_run, read_lines
from crystallm_jax.train_run.train_config import TrainConfig

CONFIG = TrainConfig(dataset="data/mine", max_iters=1000, n_layer=2, n_head=2, n_embd=32)


def _line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 10_000 * step,
        "loss": 1 + 10 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "param_norm": 30.0,
        "update_norm": 0.0 if step == 1 else 0.01,
        "skipped": int(step > 20),
        "data_wait_s": 0.01,
        "step_time_s": 50.0 if step == 1 else 2.0,
        "tokens_per_s": 200.0 if step == 1 else 5000.0,
        "data_wait_share": 0.005,
        "mfu": 0.25,
        "memory_bytes": 2**30,
        "memory_peak_bytes": 2**31 + step,
        "elapsed_s": 50.0 + 2 * step,
        **more,
    }


def _folder(path: Path, lines: list[dict[str, Any]], *, cut: str = "") -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(CONFIG))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    for name in ("10", "20", "9", "30.orbax-checkpoint-tmp-1"):
        (path / "checkpoints" / name).mkdir(parents=True)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Forty steps with evaluations at 10, 20, 30, samples at 20, and a line that is being written."""
    evaluated = {10: {"val_loss": 3.0}, 20: {"val_loss": 2.0}, 30: {"val_loss": 2.5}}
    evaluated[20] |= {"valid_share": 0.125, "finished_share": 0.75, "sampled": 8}
    lines = [_line(step, **evaluated.get(step, {})) for step in range(1, 41)]
    return _folder(tmp_path / "run", lines, cut='{"step": 41, "tok')


def test_a_run_is_summed_up(run: Path) -> None:
    assert is_run(run)
    found = describe_run(run, read_lines(run))
    assert (found.step, found.max_steps, found.tokens) == (40, 1000, 400_000)
    assert found.loss == 1.25
    assert found.mean_loss == pytest.approx(np.mean([1 + 10 / step for step in range(1, 41)]))
    assert (found.val_loss, found.val_step) == (2.5, 30)
    assert (found.best_val_loss, found.best_val_step) == (2.0, 20)
    assert (found.valid_share, found.sampled, found.sampled_step) == (0.125, 8, 20)
    assert (found.tokens_per_s, found.step_time_s, found.mfu) == (
        5000,
        2,
        0.25,
    )  # compilation is no throughput
    assert (found.skipped, found.elapsed_s, found.memory_peak_bytes) == (1, 130, 2**31 + 40)
    assert found.checkpoints == (9, 10, 20)
    assert found.config["n_embd"] == 32


def test_the_command_says_it_and_draws_the_curves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for part in (
        "step 40 of 1,000 (4.0%), 400.0 k tokens",
        "2 layers, 2 heads, width 32",
        "1.2500; mean of the newest lines",
        "2.5000 at step 30; best 2.0000 at step 20",
        "12.5% of 8 valid at step 20",
        "5,000 tokens/s (median), 2 s a step, MFU 25.0%",
        "2.00 GiB",
        "1 steps whose loss",
        "2 min; about 32 min to go",
        "of steps 9, 10, 20",
        str(run / "curves.png"),
    ):
        assert part in shown.out, part
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_of_it_and_draws_only_where_it_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(run), "--json"]) == 0
    expected = dataclasses.asdict(describe_run(run, read_lines(run)))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))
    assert not (run / "curves.png").exists()
    picture = tmp_path / "elsewhere.svg"
    assert main(["info", str(run), "--json", "--plot", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 40
    assert "<svg" in picture.read_text()


def test_a_run_without_evaluations_or_rates_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As older runs are, with a loss that was not finite, and one that is null on its last line."""
    lines = [{"step": step, "loss": None if step in (3, 5) else 2.0, "lr": 0.0} for step in range(1, 6)]
    folder = _folder(tmp_path / "run", lines)
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "not finite; mean of the newest lines 2.0000" in out
    assert "val loss" not in out
    assert (folder / "curves.png").is_file()


def test_a_run_of_one_line_is_drawn(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "run", [_line(1)])
    assert main(["info", str(folder)]) == 0
    assert (folder / "curves.png").is_file()


def test_a_run_that_has_logged_nothing_yet_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _folder(tmp_path / "run", [])
    assert main(["info", str(folder)]) == 0
    assert "step 0 of 1,000 (0.0%), 0 tokens; no step is logged yet" in capsys.readouterr().out
    assert not (folder / "curves.png").exists()
    (folder / "metrics.jsonl").unlink()
    assert main(["info", str(folder)]) == 0


@pytest.mark.parametrize(
    "garbage",
    ['{"step": 41, "loss": "x"}', '{"step": 41, "val_loss": [1]}', '{"step": true}', 5000 * "9", 9999 * "["],
)
def test_lines_that_hold_no_figures_are_left_out(
    garbage: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + garbage)
    (run / "config.yaml").write_text("max_iters: many\nbatch_size: none")
    assert main(["info", str(run)]) == 0
    assert "step 40 of 0" in capsys.readouterr().out


def test_what_cannot_be_read_or_written_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run), "--plot", str(run / "curves.qqq")]) == 1
    assert "cannot be drawn" in capsys.readouterr().err
    (run / "curves.png").mkdir()  # as good as a folder of somebody else's
    assert main(["info", str(run)]) == 0
    assert "curves       none: " in capsys.readouterr().out
    (run / "config.yaml").write_text("a: [")
    assert main(["info", str(run)]) == 1
    error = capsys.readouterr().err
    assert "config.yaml: cannot be read as YAML" in error
    assert error.count("\n") == 1


def test_what_may_not_be_looked_into_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "x" * 300]) == 1
    assert capsys.readouterr().err.count("cannot be read: File name too long") == 1


def test_a_prepared_folder_is_no_run(run: Path) -> None:
    (run / "train.bin").write_bytes(b"")
    assert not is_run(run)


def test_a_long_curve_is_averaged(run: Path) -> None:
    lines = [{"step": step, "loss": float(step % 2), "mfu": math.nan} for step in range(1, 10_001)]
    full = curve(lines, "loss")
    short = averaged(full, points=100)
    assert len(short.steps) == 100
    np.testing.assert_allclose(short.values, 0.5)
    np.testing.assert_allclose(short.steps, np.arange(100) * 100 + 50.5)
    assert averaged(short, points=100) is short
    assert len(curve(lines, "nothing").steps) == 0


def test_the_report_has_short_lines(run: Path) -> None:
    text = report(dataclasses.replace(describe_run(run, read_lines(run)), folder="runs/mine"))
    assert max(map(len, text.splitlines())) <= 110
