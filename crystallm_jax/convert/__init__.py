"""Models in every format, read into `Weights` and written from them; and where those lie that are named."""

from crystallm_jax.convert.published import read_published
from crystallm_jax.convert.weights import Moments, Training, Weights

__all__ = ["Moments", "Training", "Weights", "read_published"]
