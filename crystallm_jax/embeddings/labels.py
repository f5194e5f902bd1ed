"""Where to write labels so that they cover neither each other nor the points."""

from typing import NamedTuple

import numpy as np

# Directions from the point, the readable ones first, and distances of a label's edge from its point's, in heights.
_DIRECTIONS = np.array(
    (
        *((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)),
        *((1, 0.5), (-1, 0.5), (1, -0.5), (-1, -0.5), (0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1)),
    ),
    float,
)
_DISTANCES = (0.1, 0.4, 0.9, 1.5, 2.2, 3.0, 4.0)
_PASSES = 8
# What is worse: to cover a point, a label, to be far off, or to stand in a less readable direction.
_DOT, _LABEL, _FAR, _ORDER = 6.0, 3.0, 0.25, 0.01
# The share of a label that another may cover: boxes are larger than the letters in them.
_TOUCHING = 0.12


class Labels(NamedTuple):
    """Where labels go.

    Attributes:
        centres: [N, 2].
        legible: bool [N], False for those that would lie over others, in a dense crowd.
    """

    centres: np.ndarray
    legible: np.ndarray


def spread(points: np.ndarray, sizes: np.ndarray, *, radius: float, box: np.ndarray) -> Labels:
    """Places of labels close to their points.

    Each label in turn takes the best of some places around its point, given where the others are, until none moves.

    Args:
        points: [N, 2] in some unit of length.
        sizes: [N, 2] of the labels, width and height, in the same unit.
        radius: of the points as they are drawn.
        box: [2, 2], the corners that labels keep within where they can.
    """
    half = sizes / 2
    places, costs = _candidates(points, sizes, radius)
    dots = _covered(places, half[:, None], points, np.full_like(half, radius))
    below = np.maximum(box[0] - (places - half[:, None]), 0)
    above = np.maximum(places + half[:, None] - box[1], 0)
    areas = np.maximum(sizes.prod(axis=1), 1e-9)[:, None]
    costs = costs + _DOT * dots / areas + (below + above).sum(axis=-1)
    chosen = costs.argmin(axis=1)
    rows = np.arange(len(points))
    for _ in range(_PASSES):
        before = chosen.copy()
        for i in np.argsort(-costs.min(axis=1), kind="stable"):
            centres = places[rows, chosen]
            others = rows != i
            covered = _covered(places[i][None], half[i][None, None], centres[others], half[others])[0]
            chosen[i] = int(np.argmin(costs[i] + _LABEL * covered / areas[i]))
        if (chosen == before).all():
            break
    centres = places[rows, chosen]
    return Labels(centres, _legible(centres, half))


def _legible(centres: np.ndarray, half: np.ndarray) -> np.ndarray:
    """All labels but the fewest, or nearly, that have to go for the others to be read."""
    apart = np.abs(centres[:, None] - centres[None])
    common = np.maximum(half[:, None] + half[None] - apart, 0).prod(axis=-1)
    np.fill_diagonal(common, 0)
    clash = common > _TOUCHING * (2 * half).prod(axis=1)[:, None]
    clash |= clash.T
    legible = np.ones(len(centres), dtype=bool)
    while (counts := (clash & legible & legible[:, None]).sum(axis=1)).any():
        legible[int(counts.argmax())] = False
    return legible


def _candidates(points: np.ndarray, sizes: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Places [N, C, 2] of a label around its point, and what each costs for itself [N, C]."""
    heights = sizes[:, 1]
    offsets, costs = [], []
    for distance in _DISTANCES:
        for order, direction in enumerate(_DIRECTIONS):
            reach = sizes / 2 + radius * (0.7 if direction.all() else 1.0) + distance * heights[:, None]
            offsets.append(direction * reach)
            costs.append(_FAR * distance + _ORDER * order)
    places = points[:, None] + np.stack(offsets, axis=1)
    return places, np.broadcast_to(np.array(costs), places.shape[:2])


def _covered(places: np.ndarray, half: np.ndarray, others: np.ndarray, other_half: np.ndarray) -> np.ndarray:
    """The area [N, C] that boxes around places share with other boxes."""
    apart = np.abs(places[:, :, None] - others[None, None])
    common = np.minimum(half[:, :, None] + other_half - apart, 2 * np.minimum(half[:, :, None], other_half))
    return np.maximum(common, 0).prod(axis=-1).sum(axis=-1)
