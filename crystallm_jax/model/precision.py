"""How exact products are."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products for float32 operands: accelerators would otherwise round them to fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
