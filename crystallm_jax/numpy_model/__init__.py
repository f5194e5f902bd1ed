"""A model on NumPy alone: no accelerator, no JAX."""

from crystallm_jax.numpy_model.numpy_model import NumpyModel, load_numpy, save_numpy

__all__ = ["NumpyModel", "load_numpy", "save_numpy"]
