"""The page of a kind of tokens: the picture as SVG with a little script, in one file that needs no network."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.embeddings.classes import COLOURS, TITLES, TokenFacts, facts_of
from crystallm_jax.embeddings.labels import spread
from crystallm_jax.embeddings.neighbours import nearest_indices, unit_rows
from crystallm_jax.embeddings.projection import Projection
from crystallm_jax.embeddings.vectors import DrawnKind, EmbeddingTable, drawn_kind

_WIDTH, _HEIGHT, _MARGIN = 1040, 780, 40
# Of labels in pixels, and of dots.
_SIZES: dict[DrawnKind, tuple[float, float]] = {"atom": (12, 5), "digit": (15, 13), "spacegroup": (9, 4)}
# Of a letter, in parts of the font's size.
_LETTER_WIDTH, _LINE_HEIGHT = 0.62, 1.1
_NEIGHBOURS = 5
_SUBSCRIPTS = str.maketrans("12345", "₁₂₃₄₅")
_BAR = "\N{COMBINING MACRON}"


def page_of(table: EmbeddingTable, projection: Projection, *, name: str, measures: Sequence[str] = ()) -> str:
    """The page as HTML.

    Args:
        table: of one of the kinds that are drawn.
        projection: of its vectors.
        name: of the model.
        measures: sentences to stand below the picture.
    """
    kind = drawn_kind(table)
    if kind == "digit":
        order = np.argsort([int(token) for token in table.tokens])
        tokens = tuple(table.tokens[i] for i in order)
        table = replace(table, tokens=tokens, vectors=table.vectors[order])
        projection = projection._replace(points=projection.points[order])
    facts = [facts_of(token, kind) for token in table.tokens]
    records = _records(table, projection, facts)
    font, _ = _SIZES[kind]
    present = {fact.class_name for fact in facts}
    classes = [name for name in COLOURS if name in present]
    parts = {
        "title": escape(f"{name}: {TITLES[kind]}"),
        "subtitle": escape(
            f"{len(table.tokens)} vectors of {table.vectors.shape[1]} numbers, {projection.method}"
        ),
        "font": f"{font:g}",
        "kind": kind,
        "width": str(_WIDTH),
        "height": str(_HEIGHT),
        "legend": "".join(map(_button, classes)) if len(classes) > 1 else "",
        "options": "".join(f'<option value="{escape(token)}">' for token in table.tokens),
        "picture": _picture(kind, projection, facts, records),
        "measures": "<br>".join(map(escape, measures)),
        # What would end the script is written otherwise.
        "data": json.dumps(records, ensure_ascii=False).replace("<", "\\u003c"),
    }
    return _filled(parts)


def _filled(parts: Mapping[str, str]) -> str:
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], template)


def _records(
    table: EmbeddingTable, projection: Projection, facts: Sequence[TokenFacts]
) -> list[dict[str, Any]]:
    """What the script knows of each token; `near` has index and cosine."""
    places = _pixels(projection.points)
    near = nearest_indices(table, _NEIGHBOURS)
    units = unit_rows(table.vectors)
    return [
        {
            "token": token,
            "label": readable(fact.label),
            "class": fact.class_name,
            "facts": fact.facts,
            "x": round(float(place[0]), 2),
            "y": round(float(place[1]), 2),
            "near": [(int(j), round(float(units[i] @ units[j]), 4)) for j in near[i]],
        }
        for i, (token, fact, place) in enumerate(zip(table.tokens, facts, places, strict=True))
    ]


def _pixels(points: np.ndarray) -> np.ndarray:
    low, high = points.min(axis=0), points.max(axis=0)
    shares = (points - low) / np.maximum(high - low, 1e-9)
    shares[:, 1] = 1 - shares[:, 1]
    return 1.5 * _MARGIN + shares * (np.array([_WIDTH, _HEIGHT]) - 3 * _MARGIN)


def _picture(
    kind: DrawnKind,
    projection: Projection,
    facts: Sequence[TokenFacts],
    records: Sequence[Mapping[str, Any]],
) -> str:
    font, radius = _SIZES[kind]
    places = np.array([(record["x"], record["y"]) for record in records])
    widths = [len(record["label"].replace(_BAR, "")) * _LETTER_WIDTH * font for record in records]
    sizes = np.stack([widths, np.full(len(widths), _LINE_HEIGHT * font)], axis=1)
    corners = np.array([(0.0, 0.0), (_WIDTH, _HEIGHT - _MARGIN)])
    centres, legible = spread(places, sizes, radius=radius, box=corners)
    offsets = centres - places
    if kind == "digit":
        offsets = np.zeros_like(places)
    x, y = (escape(text) for text in projection.axes)
    lines = [
        f'<text class="axis" x="{_WIDTH / 2:g}" y="{_HEIGHT - 10}" text-anchor="middle">{x}</text>',
        f'<text class="axis" transform="translate(16 {_HEIGHT / 2:g}) rotate(-90)" text-anchor="middle">{y}</text>',
    ]
    if kind == "digit":
        path = " ".join(f"{px:g},{py:g}" for px, py in places)
        lines.append(f'<polyline id="order" points="{path}"/>')
    lines.append('<g id="links"></g>')
    for i, (record, fact) in enumerate(zip(records, facts, strict=True)):
        mark = _mark(record, fact, records, offset=offsets[i], half=sizes[i] / 2, radius=radius)
        lines.append(mark if legible[i] or kind == "digit" else mark.replace("point", "point crowded", 1))
    return "\n".join(lines)


def _mark(
    record: Mapping[str, Any],
    fact: TokenFacts,
    records: Sequence[Mapping[str, Any]],
    *,
    offset: np.ndarray,
    half: np.ndarray,
    radius: float,
) -> str:
    """A token's dot and label, and what stands where scripts do not run: a title with all of it."""
    neighbours = ", ".join(f"{records[j]['label']} {cosine:.3f}" for j, cosine in record["near"])
    known = [f"{key}: {value}" for key, value in (("token", record["token"]), *fact.facts)]
    title = escape("\n".join([*known, f"nearest: {neighbours}"]))
    end = np.clip(np.zeros(2), offset - half, offset + half)
    far = float(np.linalg.norm(end)) > 2 * radius
    line = f'<line x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>' if far else ""
    return (
        f'<g class="point" tabindex="0" transform="translate({record["x"]} {record["y"]})"><title>{title}</title>{line}'
        f'<circle r="{radius:g}" fill="{COLOURS[fact.class_name]}"/>'
        f'<text x="{offset[0]:.1f}" y="{offset[1]:.1f}">{escape(record["label"])}</text></g>'
    )


def _button(name: str) -> str:
    return (
        f'<button type="button" data-class="{name}" aria-pressed="true">'
        f'<span class="dot" style="background:{COLOURS[name]}"></span>{name}</button>'
    )


def readable(label: str) -> str:
    """A label in plain characters: `Fd-3m` with a bar over the 3, `P4_2` with the 2 below the line."""
    barred = re.sub(r"-(\d)", rf"\1{_BAR}", label)
    return re.sub(r"_(\d)", lambda found: found[1].translate(_SUBSCRIPTS), barred)
