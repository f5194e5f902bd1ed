"""A model on NumPy alone: no accelerator, no JAX."""

from crystallm_jax.portable.model import NumpyModel, load_numpy, save_numpy

__all__ = ["NumpyModel", "load_numpy", "save_numpy"]
