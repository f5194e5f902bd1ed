"""`crystallm info` of a run folder: where the run stands, as text or JSON, and its curves."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crystallm_jax.errors import DataError
from crystallm_jax.train_run.status import RunDescription, describe_run, read_lines, whole_number

CURVES_FILE = "curves.png"
_HEAD = 13


def show(arguments: argparse.Namespace) -> int:
    """Describe a run, and draw its curves: where `--plot` says, else into the run folder (`--json` alone: nowhere).

    Raises:
        DataError: the run cannot be read, or the picture not be written where it was asked for.
    """
    folder = Path(arguments.folder)
    lines = read_lines(folder)
    found = describe_run(folder, lines)
    if arguments.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(report(found))
    if not lines or (arguments.json and arguments.plot is None):
        return 0
    from crystallm_jax.cli.run_plot import plot_run  # noqa: PLC0415  needs matplotlib

    picture = arguments.plot or folder / CURVES_FILE
    drawn = str(picture)
    try:
        plot_run(found, lines, picture)
    except DataError as error:
        if arguments.plot is not None:
            raise
        # Whoever may only read the folder still gets the text.
        drawn = f"none: {error}"
    if not arguments.json:
        sys.stdout.write(_row("curves", drawn) + "\n")
    return 0


def report(found: RunDescription) -> str:
    """Where a run stands, as text."""
    done = f" ({found.step / found.max_steps:.1%})" if found.max_steps else ""
    written = f"; last line written {found.updated}" if found.updated else "; no step is logged yet"
    head = f"{found.folder}: step {found.step:,} of {found.max_steps:,}{done}, {_count(found.tokens)} tokens{written}"
    return "\n".join([head, "", *_settings(found.config), "", *_figures(found)]) + "\n"


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    get = config.get
    yield _row(
        "model",
        f"{get('n_layer')} layers, {get('n_head')} heads, width {get('n_embd')}, context {get('block_size')},"
        f" dropout {get('dropout')}, {get('dtype')}",
    )
    yield _row("data", f"{get('dataset')}, windows {get('windows')}, seed {get('seed')}")
    parts = [whole_number(get(key)) for key in ("gradient_accumulation_steps", "batch_size", "block_size")]
    yield _row(
        "step",
        f"{' × '.join(map(str, parts))} = {math.prod(parts):,} tokens; {get('optimizer')}, learning rate"
        f" {get('learning_rate')}",
    )


def _figures(found: RunDescription) -> Iterator[str]:
    if found.mean_loss is not None:
        newest = "not finite" if found.loss is None else f"{found.loss:.4f}"
        yield _row("loss", f"{newest}; mean of the newest lines {found.mean_loss:.4f}")
    if found.train_loss is not None:
        yield _row("train loss", f"{found.train_loss:.4f} at the last evaluation")
    if found.val_loss is not None:
        yield _row(
            "val loss",
            f"{found.val_loss:.4f} at step {found.val_step:,}; best {found.best_val_loss:.4f} at step"
            f" {found.best_val_step:,}",
        )
    if found.valid_share is not None:
        yield _row(
            "samples", f"{found.valid_share:.1%} of {found.sampled:,} valid at step {found.sampled_step:,}"
        )
    if found.tokens_per_s is not None:
        yield _row("speed", _speed(found))
    if found.memory_peak_bytes is not None:
        yield _row("memory", f"{found.memory_peak_bytes / 1024**3:.2f} GiB at most")
    if found.skipped:
        yield _row("skipped", f"{found.skipped:,} steps whose loss or gradient was not finite")
    if found.elapsed_s is not None:
        left = found.max_steps - found.step
        to_go = (
            f"; about {_duration(left * found.step_time_s)} to go at this speed"
            if left > 0 and found.step_time_s is not None
            else ""
        )
        yield _row("time", f"{_duration(found.elapsed_s)}{to_go}")
    kept = ", ".join(map(str, found.checkpoints))
    yield _row("checkpoints", f"of steps {kept}" if kept else "none yet")


def _speed(found: RunDescription) -> str:
    parts = [f"{found.tokens_per_s:,.0f} tokens/s (median)"]
    if found.step_time_s is not None:
        parts.append(f"{found.step_time_s:.3g} s a step")
    if found.mfu is not None:
        parts.append(f"MFU {found.mfu:.1%}")
    if found.data_wait_share is not None:
        parts.append(f"{found.data_wait_share:.1%} of it waiting for data")
    return ", ".join(parts)


def _row(head: str, text: str) -> str:
    return f"{head:<{_HEAD}}{text}"


def _count(number: int) -> str:
    """A count in three or four digits: `98.3 M`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
