"""Checkpoints of other programs, in and out."""

from crystallm_jax.convert.published import read_published
from crystallm_jax.convert.weights import Moments, Training, Weights

__all__ = ["Moments", "Training", "Weights", "read_published"]
