"""The vectors of a model's tokens: as files, in the plane, and which of them are alike."""

from crystallm_jax.embeddings.measures import measures
from crystallm_jax.embeddings.neighbours import Neighbour, nearest
from crystallm_jax.embeddings.projection import Projection, pca, project, tsne
from crystallm_jax.embeddings.vectors import (
    EmbeddingTable,
    find_token,
    kind_of,
    read_csv,
    to_csv,
    tokens_of,
    vectors_of,
)

__all__ = [
    "EmbeddingTable",
    "Neighbour",
    "Projection",
    "find_token",
    "kind_of",
    "measures",
    "nearest",
    "pca",
    "project",
    "read_csv",
    "to_csv",
    "tokens_of",
    "tsne",
    "vectors_of",
]
