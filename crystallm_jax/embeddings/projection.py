"""Vectors in a plane: principal components, and t-SNE."""

from typing import Literal, NamedTuple, assert_never

import numpy as np

from crystallm_jax.embeddings.neighbours import unit_rows
from crystallm_jax.errors import ConfigError

ProjectionName = Literal["pca", "tsne"]

# As published for t-SNE, beside cosine distances.
_LEARNING_RATE = 10.0
# What scikit-learn scales a start from principal components to.
_START_SCALE, _LEAST = 1e-4, 1e-12


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
    """Vectors [N, D] in a plane, by the method of that name.

    Raises:
        ConfigError: t-SNE is wanted and scikit-learn is not installed.
    """
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
    """t-SNE of vectors [N, D] over cosine distances, by scikit-learn, exact, started from the principal components.

    The same vectors give the same points (on one machine).

    Args:
        vectors: at least 3 of them.
        perplexity: neighbours that count, so to speak; at most a third of the others is taken.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE  # noqa: PLC0415  optional, and slow to import
    except ImportError:
        raise ConfigError(
            "t-SNE needs scikit-learn, which is not installed: pip install 'crystallm-jax[embeddings]', or take pca"
        ) from None
    start = pca(unit_rows(vectors)).points
    # Its own start is NaN where all vectors are the same. Exact is the quicker method for a few hundred of them.
    method = TSNE(
        metric="cosine",
        method="exact",
        init=start * (_START_SCALE / max(float(start[:, 0].std()), _LEAST)),
        learning_rate=_LEARNING_RATE,
        perplexity=min(perplexity, (len(vectors) - 1) / 3),
        random_state=0,
    )
    points = method.fit_transform(vectors)
    return Projection("t-SNE", points - points.mean(axis=0), ("t-SNE 1", "t-SNE 2"), None)
