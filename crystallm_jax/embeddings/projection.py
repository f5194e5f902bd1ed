"""Vectors in a plane: principal components, and t-SNE."""

from typing import Literal, NamedTuple, assert_never

import numpy as np

from crystallm_jax.embeddings.neighbours import unit_rows

ProjectionName = Literal["pca", "tsne"]

# As published for t-SNE: over cosine distances. What follows is the usual schedule.
_EXAGGERATION, _EXAGGERATED_STEPS, _STEPS = 12.0, 250, 1000
_EARLY_MOMENTUM, _MOMENTUM = 0.5, 0.8
_LEAST_GAIN, _START_SCALE, _LEAST = 0.01, 1e-4, 1e-12
_BISECTIONS = 64


class Projection(NamedTuple):
    """Points of a plane.

    Attributes:
        method: in words.
        points: float64 [N, 2].
        axes: what to write at them.
        shares: of the variance that each axis holds; None where the method has no such thing.
    """

    method: str
    points: np.ndarray
    axes: tuple[str, str]
    shares: tuple[float, float] | None


def project(vectors: np.ndarray, name: ProjectionName) -> Projection:
    """Vectors [N, D] in a plane, by the method of that name."""
    match name:
        case "pca":
            return pca(vectors)
        case "tsne":
            return tsne(vectors)
    assert_never(name)


def pca(vectors: np.ndarray) -> Projection:
    """The first two principal components of vectors [N, D], centred, not scaled.

    The sign of a component is the one that makes its largest loading positive.
    """
    centred = vectors - vectors.mean(axis=0)
    scores, sizes, loadings = np.linalg.svd(centred, full_matrices=False)
    largest = np.argmax(np.abs(loadings[:2]), axis=1)
    signs = np.where(loadings[[0, 1], largest] < 0, -1.0, 1.0)
    variance = sizes**2
    first, second = (float(part) / max(float(variance.sum()), _LEAST) for part in variance[:2])
    axes = (f"component 1 ({first:.1%} of the variance)", f"component 2 ({second:.1%})")
    return Projection("principal components", scores[:, :2] * sizes[:2] * signs, axes, (first, second))


def tsne(vectors: np.ndarray, *, perplexity: float = 30.0) -> Projection:
    """t-SNE of vectors [N, D] over cosine distances, exact, started from the principal components.

    Nothing in it is drawn by chance: the same vectors give the same points (on one machine).

    Args:
        vectors: at least 3 of them.
        perplexity: neighbours that count, so to speak; at most a third of the others is taken.
    """
    count = len(vectors)
    units = unit_rows(vectors)
    wanted = _affinities(1 - units @ units.T, min(perplexity, (count - 1) / 3))
    start = pca(units).points
    points = start * (_START_SCALE / max(float(start[:, 0].std()), _LEAST))
    # As Belkina et al. (2019) found best; a floor under it, as libraries have, throws few points far apart.
    rate = count / _EXAGGERATION
    update, gains = np.zeros_like(points), np.ones_like(points)
    for step in range(_STEPS):
        early = step < _EXAGGERATED_STEPS
        gradient = _gradient(points, wanted * _EXAGGERATION if early else wanted)
        gains = np.maximum(np.where(update * gradient < 0, gains + 0.2, gains * 0.8), _LEAST_GAIN)
        update = (_EARLY_MOMENTUM if early else _MOMENTUM) * update - rate * gains * gradient
        points = points + update
    return Projection("t-SNE", points - points.mean(axis=0), ("t-SNE 1", "t-SNE 2"), None)


def divergence(vectors: np.ndarray, points: np.ndarray, *, perplexity: float = 30.0) -> float:
    """What t-SNE makes small, in nats: how far neighbourhoods in the plane are from those among the vectors."""
    units = unit_rows(vectors)
    wanted = _affinities(1 - units @ units.T, min(perplexity, (len(vectors) - 1) / 3))
    found = _kernel(points)
    found = np.maximum(found / found.sum(), _LEAST)
    return float(np.sum(wanted * np.log(np.maximum(wanted, _LEAST) / found)))


def _affinities(distances: np.ndarray, perplexity: float) -> np.ndarray:
    """Symmetric probabilities [N, N] from Gaussians, each as wide as gives its row the perplexity."""
    off_diagonal = ~np.eye(len(distances), dtype=bool)
    others = distances[off_diagonal].reshape(len(distances), -1)
    others = others - others.min(axis=1, keepdims=True)
    low, high = np.full(len(others), -40.0), np.full(len(others), 40.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        wide = _entropies(_rows(others, middle)) > np.log(perplexity)
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    conditional = np.zeros_like(distances)
    conditional[off_diagonal] = _rows(others, (low + high) / 2).ravel()
    return (conditional + conditional.T) / (2 * len(distances))


def _rows(distances: np.ndarray, log_precision: np.ndarray) -> np.ndarray:
    weights = np.exp(-distances * np.exp(log_precision)[:, None])
    return weights / weights.sum(axis=1, keepdims=True)


def _entropies(rows: np.ndarray) -> np.ndarray:
    return -(rows * np.log(np.maximum(rows, _LEAST))).sum(axis=1)


def _kernel(points: np.ndarray) -> np.ndarray:
    squares = (points**2).sum(axis=1)
    kernel = 1 / (1 + np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    np.fill_diagonal(kernel, 0)
    return kernel


def _gradient(points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    kernel = _kernel(points)
    pull = (wanted - kernel / kernel.sum()) * kernel
    return 4 * (pull.sum(axis=1, keepdims=True) * points - pull @ points)
