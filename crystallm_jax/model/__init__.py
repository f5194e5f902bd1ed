"""The transformer, its attention, and the same for decoding, with its key-value cache.

Names are loaded on first use: the configuration and what converts weights need no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crystallm_jax.lazy import lazy_names

if TYPE_CHECKING:
    from crystallm_jax.model.config import ModelConfig, flops_per_token
    from crystallm_jax.model.transformer import GPT, count_params, init_params

__all__ = ["GPT", "ModelConfig", "count_params", "flops_per_token", "init_params"]

_MODULES = {
    "GPT": "transformer",
    "ModelConfig": "config",
    "count_params": "transformer",
    "flops_per_token": "config",
    "init_params": "transformer",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
