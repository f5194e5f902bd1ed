"""Models in every format, read into `Model` and written from them; and where those lie that are named."""

from crystallm_jax.models.model import Model, Moments, Training
from crystallm_jax.models.published import read_published

__all__ = ["Model", "Moments", "Training", "read_published"]
