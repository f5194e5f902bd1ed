"""The transformer, its attention and its key-value cache."""

from crystallm_jax.model.cache import KVCache, grow_cache, init_cache
from crystallm_jax.model.config import ModelConfig, flops_per_token
from crystallm_jax.model.transformer import GPT, count_params, init_params

__all__ = [
    "GPT",
    "KVCache",
    "ModelConfig",
    "count_params",
    "flops_per_token",
    "grow_cache",
    "init_cache",
    "init_params",
]
