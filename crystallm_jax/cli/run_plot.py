"""The picture of `crystallm info RUN`: the curves of a training run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crystallm_jax.errors import DataError
from crystallm_jax.train_run.status import RunDescription

# More points than a curve is wide in pixels are averaged.
_MOST_POINTS = 600
_BLUE, _RED, _GREEN, _YELLOW = "#4477aa", "#aa3377", "#228833", "#ccbb44"
_COLUMNS = 2
_FEW_POINTS = 40
# The share of the steps whose losses may lie above the picture.
_BEGINNING = 0.1


class Curve(NamedTuple):
    """Some figure by step."""

    steps: np.ndarray
    values: np.ndarray


def plot_run(found: RunDescription, lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses, the learning rate, norms, speed, and the validity of samples if there were any.

    Args:
        found: the run.
        lines: of its `metrics.jsonl`.
        path: of the picture; its ending says the format.

    Raises:
        DataError: the file cannot be written, or not in this format.
    """
    panels: list[Callable[[Axes, Sequence[Mapping[str, Any]]], None]] = [
        _losses,
        _norms,
        _learning_rate,
        _speed,
    ]
    if len(curve(lines, "valid_share").steps):
        panels.append(_validity)
    if len(curve(lines, "memory_bytes").steps):
        panels.append(_memory_and_data)
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.8 * _COLUMNS, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True)
    for axes, draw in zip(grid.flat, panels, strict=False):
        draw(axes, lines)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes in tuple(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in tuple(grid.flat)[max(len(panels) - _COLUMNS, 0) : len(panels)]:
        axes.set_xlabel("step")
    title = f"{Path(found.folder).resolve().name}: step {found.step:,} of {found.max_steps:,}"
    figure.suptitle(title, fontsize="medium")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be drawn ({reason}): give --plot a name such as out.png") from error


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """What the lines hold of a figure; those without it, or where it was not finite, are left out."""
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return Curve(steps, values)


def averaged(full: Curve, points: int = _MOST_POINTS) -> Curve:
    """The means of so many stretches of a curve, or the curve itself where it has no more points."""
    count = len(full.steps)
    if count <= points:
        return full
    edges = np.linspace(0, count, points + 1).astype(int)
    sizes = np.diff(edges)
    return Curve(*(np.add.reduceat(part, edges[:-1]) / sizes for part in full))


def _losses(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    loss, evaluated, validation = (
        averaged(curve(lines, name)) for name in ("loss", "train_loss", "val_loss")
    )
    axes.plot(*loss, color=_BLUE, linewidth=1, label="loss")
    if len(evaluated.steps):
        axes.plot(*evaluated, _marker(evaluated), color=_GREEN, markersize=3, linewidth=1, label="train loss")
    if len(validation.steps):
        axes.plot(
            *validation, _marker(validation), color=_RED, markersize=3, linewidth=1, label="validation loss"
        )
        exact = curve(lines, "val_loss")
        best = int(np.argmin(exact.values))
        label = f"best {exact.values[best]:.4f} at {exact.steps[best]:,.0f}"
        axes.plot(exact.steps[best], exact.values[best], "*", color=_RED, markersize=11, label=label)
    if len(loss.steps) > _FEW_POINTS:
        # The first steps fall from so high that the rest would be a line at the bottom.
        begin = loss.steps[0] + _BEGINNING * (loss.steps[-1] - loss.steps[0])
        seen = np.concatenate([part.values[part.steps >= begin] for part in (loss, evaluated, validation)])
        low, high = float(seen.min()), float(seen.max())
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + 3 * margin)
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False, fontsize="small")


def _marker(drawn: Curve) -> str:
    return "o-" if len(drawn.steps) <= _FEW_POINTS else "-"


def _norms(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    for name, label, colour in (
        ("param_norm", "parameters", _GREEN),
        ("grad_norm", "gradient, before clipping", _BLUE),
        ("update_norm", "update", _YELLOW),
    ):
        drawn = averaged(curve(lines, name))
        seen = drawn.values > 0  # a step of rate 0 changes nothing
        axes.plot(drawn.steps[seen], drawn.values[seen], color=colour, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("norm")
    axes.legend(frameon=False, fontsize="small")


def _learning_rate(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    axes.plot(*averaged(curve(lines, "lr")), color=_BLUE, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def _speed(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    speed, utilisation = averaged(curve(lines, "tokens_per_s")), averaged(curve(lines, "mfu"))
    axes.plot(*speed, color=_BLUE, linewidth=1)
    top = _top(speed.values)
    axes.set_ylim(0, top)
    axes.set_ylabel("tokens/s")
    if len(utilisation.steps):
        # One is a multiple of the other: the same curve on another scale.
        percent = 100 * float(np.median(utilisation.values)) / max(float(np.median(speed.values)), 1e-9)
        right = axes.secondary_yaxis("right", functions=(_times(percent), _times(1 / max(percent, 1e-12))))
        right.set_ylabel("MFU (%)")


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: factor * value


def _top(values: np.ndarray) -> float:
    """The end of an axis on which a few values may lie far above the others."""
    return 1.25 * float(np.percentile(values, 98)) if len(values) and values.max() > 0 else 1.0


def _validity(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    for name, label, colour in (
        ("finished_share", "finished", _GREEN),
        ("valid_share", "valid", _BLUE),
    ):
        drawn = curve(lines, name)
        axes.plot(drawn.steps, 100 * drawn.values, "o-", color=colour, markersize=3, linewidth=1, label=label)
    axes.set_ylim(0, 102)
    axes.set_ylabel("samples (%)")
    axes.legend(frameon=False, fontsize="small")


def _memory_and_data(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    used, peak = curve(lines, "memory_bytes"), curve(lines, "memory_peak_bytes")
    for full, label, colour in ((used, "in use", _BLUE), (peak, "peak", _YELLOW)):
        drawn = averaged(Curve(full.steps, full.values / 1024**3))
        axes.plot(*drawn, color=colour, linewidth=1, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("memory (GiB)")
    axes.legend(frameon=False, fontsize="small", loc="lower left")
    waits = averaged(curve(lines, "data_wait_share"))
    if len(waits.steps):
        right = axes.twinx()
        right.plot(waits.steps, 100 * waits.values, color=_RED, linewidth=0.7)
        right.set_ylim(0, 100)
        right.set_ylabel("waiting for data (%)", color=_RED)
        right.spines["top"].set_visible(False)
