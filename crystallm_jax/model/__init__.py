"""The transformer, its attention, and the same for decoding, with its key-value cache."""

from crystallm_jax.model.config import ModelConfig, flops_per_token
from crystallm_jax.model.transformer import GPT, count_params, init_params

__all__ = ["GPT", "ModelConfig", "count_params", "flops_per_token", "init_params"]
