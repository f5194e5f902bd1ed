"""The picture of a kind of tokens in the plane."""

import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from crystallm_jax.embeddings.classes import COLOURS, TITLES, TokenFacts, facts_of
from crystallm_jax.embeddings.labels import spread
from crystallm_jax.embeddings.projection import Projection
from crystallm_jax.embeddings.vectors import DrawnKind, EmbeddingTable, drawn_kind

# Of the picture in inches, of labels in points, of dots in points across.
_SIZES: dict[DrawnKind, tuple[tuple[float, float], float, float]] = {
    "atom": ((9.0, 7.6), 8.5, 6.0),
    "digit": ((6.4, 5.4), 12.0, 18.0),
    "spacegroup": ((12.0, 10.0), 6.5, 4.5),
}
_DPI = 200
# On the left, on the right, below and above, in inches.
_MARGINS: dict[DrawnKind, tuple[float, float, float, float]] = {
    "atom": (0.9, 0.25, 0.65, 0.95),
    "digit": (0.9, 0.25, 0.65, 0.6),
    "spacegroup": (0.9, 0.25, 0.65, 0.95),
}
_POINTS_PER_INCH = 72
_ROOM = 0.06
_INK = "#222222"


def plot_table(table: EmbeddingTable, projection: Projection, path: Path, *, name: str) -> None:
    """Draw the tokens of a kind as PNG: coloured by class, each with its label; digits are joined in order.

    Args:
        table: of one of the kinds that are drawn.
        projection: of its vectors.
        path: of the picture.
        name: of the model, for the title.

    Raises:
        DataError: the table is of another kind.
        OSError: the file cannot be written.
    """
    kind = drawn_kind(table)
    facts = [facts_of(token, kind) for token in table.tokens]
    size, font, dot = _SIZES[kind]
    figure = Figure(figsize=size)
    canvas = FigureCanvasAgg(figure)
    left, right, bottom, top = _MARGINS[kind]
    width, height = size
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    _frame(axes, projection)
    if kind == "digit":
        ordered = projection.points[np.argsort([int(token) for token in table.tokens])]
        axes.plot(*ordered.T, color=COLOURS["digits"], linewidth=1.2, alpha=0.5, zorder=1)
    colours = [COLOURS[fact.class_name] for fact in facts]
    axes.scatter(
        projection.points[:, 0],
        projection.points[:, 1],
        s=dot**2,
        c=colours,
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
    )
    if kind == "digit":
        for (x, y), fact in zip(projection.points, facts, strict=True):
            axes.text(
                x, y, fact.label, fontsize=font, color="white", ha="center", va="center_baseline", zorder=4
            )
    else:
        labels = [typeset(fact.label) for fact in facts]
        _write_labels(axes, canvas, projection.points, labels, font=font, radius=dot / 2)
    _write_heads(figure, facts, f"{name}: {TITLES[kind]}, {projection.method}", left=left)
    figure.savefig(path, dpi=_DPI, format="png")


def _frame(axes: Axes, projection: Projection) -> None:
    low, high = projection.points.min(axis=0), projection.points.max(axis=0)
    room = _ROOM * np.where(high > low, high - low, 1)
    axes.set_xlim(low[0] - room[0], high[0] + room[0])
    axes.set_ylim(low[1] - room[1], high[1] + room[1])
    axes.set_xlabel(projection.axes[0])
    axes.set_ylabel(projection.axes[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.5)
    axes.set_axisbelow(True)


def _write_labels(
    axes: Axes,
    canvas: FigureCanvasAgg,
    points: np.ndarray,
    labels: list[str],
    *,
    font: float,
    radius: float,
) -> None:
    """Write the labels beside the points: those that had to give way hang on a thin line, a few are left out."""
    to_points = _POINTS_PER_INCH / axes.figure.dpi
    texts = [
        axes.text(0, 0, label, fontsize=font, color=_INK, ha="center", va="center", zorder=4)
        for label in labels
    ]
    renderer = canvas.get_renderer()
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = np.array([(extent.width, extent.height) for extent in extents]) * to_points
    corners = axes.transAxes.transform([(0, 0), (1, 1)]) * to_points
    places = axes.transData.transform(points) * to_points
    centres, legible = spread(places, sizes, radius=radius, box=corners)
    inverse = axes.transData.inverted()
    for text, centre, seen in zip(texts, inverse.transform(centres / to_points), legible, strict=True):
        text.set_position(tuple(centre))
        text.set_visible(bool(seen))
    nearest = np.clip(places, centres - sizes / 2, centres + sizes / 2)
    far = np.linalg.norm(nearest - places, axis=1) > 2 * radius
    lines = np.stack([points, inverse.transform(nearest / to_points)], axis=1)[far & legible]
    axes.add_collection(LineCollection(list(lines), colors="#999999", linewidths=0.5, zorder=2))
    hidden = int((~legible).sum())
    if hidden:
        note = f"{hidden} of {len(labels)} labels left out where points crowd"
        axes.text(
            1, 1, note, transform=axes.transAxes, ha="right", va="bottom", fontsize="small", color="#777777"
        )


def typeset(label: str) -> str:
    r"""A label for matplotlib: `Fd-3m` with a bar over the 3, `P4_2` with the 2 below the line."""
    if not re.search("[-_]", label):
        return label
    barred = re.sub(r"-(\d)", r"\\bar{\1}", label)
    lowered = re.sub(r"_(\d)", r"_{\1}", barred)
    return rf"$\mathregular{{{lowered}}}$"


def _write_heads(figure: Figure, facts: list[TokenFacts], title: str, *, left: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.2 / height, title, fontsize="large", va="top", parse_math=False)
    present = {fact.class_name for fact in facts}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name, markersize=6)
        for name, colour in COLOURS.items()
        if name in present
    ]
    if len(handles) > 1:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left / width, 1 - 0.5 / height),
            ncols=len(handles),
            frameon=False,
            borderaxespad=0,
            borderpad=0,
            handletextpad=0.2,
            columnspacing=1.4,
        )
