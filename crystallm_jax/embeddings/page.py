"""The page of a kind of tokens: the picture as one HTML file in which one points at a token, without a network."""

import re
from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.io import to_html

from crystallm_jax.embeddings.classes import COLOURS, TITLES, TokenFacts, facts_of
from crystallm_jax.embeddings.labels import spread
from crystallm_jax.embeddings.neighbours import nearest
from crystallm_jax.embeddings.projection import Projection
from crystallm_jax.embeddings.vectors import DrawnKind, EmbeddingTable, drawn_kind

# All lengths in pixels.
_WIDTH, _HEIGHT = 1100, 780
_SIDE, _BELOW, _TITLE, _LINE = 70, 60, 70, 18
_LETTERS = 12
_DIGITS = {"size": 15, "color": "white"}
_DOTS: dict[DrawnKind, int] = {"atom": 10, "digit": 26, "spacegroup": 9}
_MODES: dict[DrawnKind, str] = {
    "atom": "markers+text",
    "digit": "lines+markers+text",
    "spacegroup": "markers",
}
_FONT = {"family": "system-ui, sans-serif", "color": "#222222"}
_GREY = "#dddddd"
_NEIGHBOURS, _PLACES = 5, 5
# Nothing in the bar of buttons leads to a network; what selects points would do nothing.
_CONFIG = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
    "scrollZoom": True,
    "showSendToCloud": False,
}
_SUBSCRIPTS = str.maketrans("12345", "₁₂₃₄₅")
_BAR = "\N{COMBINING MACRON}"


def page_of(table: EmbeddingTable, projection: Projection, *, name: str, measures: Sequence[str] = ()) -> str:
    """The page as HTML, plotly's script included: the same arguments give the same bytes.

    Args:
        table: of one of the kinds that are drawn.
        projection: of its vectors.
        name: of the model.
        measures: sentences to stand below the title.

    Raises:
        DataError: the table is of another kind.
    """
    kind = drawn_kind(table)
    title = escape(f"{name}: {TITLES[kind]}, {projection.method}", quote=False)
    size = f"{len(table.tokens)} vectors of {table.vectors.shape[1]} numbers"
    lines = [escape(line, quote=False) for line in (size, *measures)]
    axis = {"zeroline": False, "gridcolor": "#eeeeee", "linecolor": _GREY, "mirror": True}
    figure = go.Figure(
        _traces(table, projection),
        go.Layout(
            template="none",
            width=_WIDTH,
            height=_HEIGHT + _LINE * len(lines),
            title={
                "text": title,
                "x": _SIDE / _WIDTH,
                "yref": "container",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": _LINE},
                "subtitle": {"text": "<br>".join(lines), "font": {"size": 13}},
            },
            font=_FONT,
            margin={"l": _SIDE, "r": 2 * _SIDE, "t": _TITLE + _LINE * len(lines), "b": _BELOW},
            xaxis={"title": {"text": escape(projection.axes[0])}, **axis},
            yaxis={"title": {"text": escape(projection.axes[1])}, **axis},
            hoverlabel={"bgcolor": "white", "bordercolor": "#999999", "align": "left", "font": _FONT},
            hovermode="closest",
            dragmode="pan",
        ),
    )
    html: str = to_html(
        figure,
        config=_CONFIG,
        include_plotlyjs=True,
        full_html=True,
        div_id="plot",
    )
    return html.replace("<head>", f"<head><title>{title}</title>", 1)


def _traces(table: EmbeddingTable, projection: Projection) -> list[go.Scatter]:
    """A trace a class, in the order of the legend; digits are one, in their order, and joined."""
    kind = drawn_kind(table)
    facts = [facts_of(token, kind) for token in table.tokens]
    order = list(range(len(facts)))
    sides = ["middle center"] * len(facts)
    if kind == "digit":
        order.sort(key=lambda i: int(table.tokens[i]))
    elif kind == "atom":
        sides = _sides(projection.points, [fact.label for fact in facts])
    traces = []
    for name, colour in COLOURS.items():
        rows = [i for i in order if facts[i].class_name == name]
        trace = go.Scatter(
            x=projection.points[rows, 0].round(_PLACES).tolist(),
            y=projection.points[rows, 1].round(_PLACES).tolist(),
            name=name,
            mode=_MODES[kind],
            text=[readable(facts[i].label) for i in rows],
            textposition=[sides[i] for i in rows],
            textfont=_DIGITS if kind == "digit" else {"size": _LETTERS},
            hovertext=[_hover(table, table.tokens[i], facts[i]) for i in rows],
            hoverinfo="text",
            marker={"color": colour, "size": _DOTS[kind], "line": {"color": "white", "width": 1}},
            # Half transparent, for the dots to stand out.
            line={"color": f"rgba{(*bytes.fromhex(colour[1:]), 0.5)}", "width": 1.5},
        )
        if rows:
            traces.append(trace)
    return traces


def _sides(points: np.ndarray, labels: Sequence[str]) -> list[str]:
    """On which side of its point each label crowds the others least, in plotly's words."""
    area = np.array([_WIDTH - 3 * _SIDE, _HEIGHT - _TITLE - _BELOW])
    extent = np.ptp(points, axis=0)
    places = (points - points.min(axis=0)) / np.where(extent > 0, extent, 1) * area
    sizes = np.array([(0.65 * _LETTERS * len(label), 1.2 * _LETTERS) for label in labels])
    radius = _DOTS["atom"] / 2
    offsets = spread(places, sizes, radius=radius, box=np.stack([-area, 2 * area])).centres - places
    # What is less than half as far as the label reaches is in the middle.
    across, up = np.sign(np.trunc(2 * offsets / (sizes / 2 + radius))).astype(int).T
    rows, columns = ("middle", "top", "bottom"), ("center", "right", "left")
    return [f"{rows[y]} {columns[x]}" for x, y in zip(across, up, strict=True)]


def _hover(table: EmbeddingTable, token: str, fact: TokenFacts) -> str:
    """What is shown where one points at a token."""
    near = nearest(table, token, _NEIGHBOURS)
    kind = drawn_kind(table)
    lines = [f"<b>{escape(readable(fact.label))}</b>", f"token: {escape(token)}"]
    lines += [f"{key}: {escape(value)}" for key, value in fact.facts]
    lines += ["nearest by cosine:"]
    lines += [f"  {escape(readable(facts_of(other, kind).label))} {cosine:.3f}" for other, cosine in near]
    return "<br>".join(lines)


def readable(label: str) -> str:
    """A label in plain characters: `Fd-3m` with a bar over the 3, `P4_2` with the 2 below the line."""
    barred = re.sub(r"-(\d)", rf"\1{_BAR}", label)
    return re.sub(r"_(\d)", lambda found: found[1].translate(_SUBSCRIPTS), barred)
