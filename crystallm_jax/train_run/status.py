"""What can be told of a run without JAX, while it runs too."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from crystallm_jax.errors import DataError
from crystallm_jax.train_run.metrics import METRICS_FILE, read_metrics
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, CONFIG_FILE, saved_steps

# Lines over which the training loss is averaged: a single step's is noisy.
_AVERAGED = 50


@dataclass(frozen=True)
class RunDescription:
    """Where a run stands. What it has not come to yet is None.

    Attributes:
        folder: the run's.
        config: its `config.yaml`.
        step: of the newest line of `metrics.jsonl`; 0 without one.
        max_steps: at which it ends.
        tokens: read so far.
        updated: when a line was last written, ISO 8601 in UTC.
        loss: of the newest line.
        mean_loss: of the newest lines, at most 50.
        train_loss: of the newest evaluation on the training set.
        val_loss: of the newest evaluation.
        val_step: its step.
        best_val_loss: the lowest.
        best_val_step: its step.
        valid_share: of the samples of the newest sampling, 0 to 1.
        sampled: how many those were.
        sampled_step: its step.
        tokens_per_s: median over the lines.
        step_time_s: likewise.
        mfu: likewise, 0 to 1.
        data_wait_share: likewise: of the step's time, spent waiting for data.
        memory_peak_bytes: greatest.
        skipped: steps that changed nothing, because a loss or gradient was not finite.
        elapsed_s: that it took, all its sessions together.
        checkpoints: steps of those on disk.
    """

    folder: str
    config: Mapping[str, Any]
    step: int
    max_steps: int
    tokens: int
    updated: str | None
    loss: float | None
    mean_loss: float | None
    train_loss: float | None
    val_loss: float | None
    val_step: int | None
    best_val_loss: float | None
    best_val_step: int | None
    valid_share: float | None
    sampled: int | None
    sampled_step: int | None
    tokens_per_s: float | None
    step_time_s: float | None
    mfu: float | None
    data_wait_share: float | None
    memory_peak_bytes: int | None
    skipped: int
    elapsed_s: float | None
    checkpoints: tuple[int, ...]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none where it has no such file yet.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / METRICS_FILE
    try:
        return list(read_metrics(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def describe_run(folder: Path, lines: Sequence[Mapping[str, Any]]) -> RunDescription:
    """Sum up a run.

    Args:
        folder: the run's.
        lines: of its `metrics.jsonl`.

    Raises:
        DataError: its configuration cannot be read.
    """
    config = _read_config(folder / CONFIG_FILE)
    last: Mapping[str, Any] = lines[-1] if lines else {}
    validated = [line for line in lines if _is_number(line.get("val_loss"))]
    best = min(validated, key=lambda line: line["val_loss"], default={})
    sampled: Mapping[str, Any] = next((line for line in reversed(lines) if "valid_share" in line), {})
    losses = _numbers(lines[-_AVERAGED:], "loss")
    peaks = _numbers(lines, "memory_peak_bytes")
    metrics = folder / METRICS_FILE
    return RunDescription(
        folder=str(folder),
        config=config,
        step=int(last.get("step", 0)),
        max_steps=whole_number(config.get("max_iters")),
        tokens=whole_number(last.get("tokens")),
        updated=_written(metrics) if lines else None,
        loss=last.get("loss"),
        mean_loss=statistics.fmean(losses) if losses else None,
        train_loss=next((line["train_loss"] for line in reversed(lines) if "train_loss" in line), None),
        val_loss=validated[-1]["val_loss"] if validated else None,
        val_step=validated[-1]["step"] if validated else None,
        best_val_loss=best.get("val_loss"),
        best_val_step=best.get("step"),
        valid_share=sampled.get("valid_share"),
        sampled=sampled.get("sampled"),
        sampled_step=sampled.get("step"),
        tokens_per_s=_median(lines, "tokens_per_s"),
        step_time_s=_median(lines, "step_time_s"),
        mfu=_median(lines, "mfu"),
        data_wait_share=_median(lines, "data_wait_share"),
        memory_peak_bytes=int(max(peaks)) if peaks else None,
        skipped=int(last.get("skipped") or 0),
        elapsed_s=last.get("elapsed_s"),
        checkpoints=saved_steps(folder / CHECKPOINTS_FOLDER),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds no `key: value` lines")
    return {str(key): value for key, value in config.items()}


def whole_number(value: Any) -> int:
    """A count from a file that people may edit; 0 where there is none."""
    return value if type(value) is int else 0


def _written(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _numbers(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if _is_number(line.get(name))]


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = _numbers(lines, name)
    return statistics.median(found) if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
