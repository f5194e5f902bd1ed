"""GELU and LayerNorm, computed in float32 whatever their operands, each with a backward pass of its own.

In bfloat16 every step of an automatic backward pass would be rounded, which CPUs emulate at a cost, and more than the
operands would be kept for it.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

# The tanh form of GELU (Hendrycks and Gimpel 2016), as GPT-2 has it.
_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form, element by element, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + _tanh(wide))).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    tanh = _tanh(wide)
    inner = _SLOPE * (1 + 3 * _CUBIC * wide * wide)
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * inner
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(_SLOPE * (x + _CUBIC * x * x * x))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """X [..., D] with mean 0 and variance 1 along its last axis, times a float32 scale [D], plus a bias; in x's dtype.

    The variance is taken in a second pass over the data: from sums of squares it would lose digits.
    """
    centred, inverse = _centred(x, epsilon)
    y = centred * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def _centred(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred, jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def _normalise_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return normalise(x, scale, bias, epsilon), (x, scale, bias)


def _normalise_backward(
    epsilon: float, saved: tuple[jax.Array, jax.Array, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, scale, bias = saved
    centred, inverse = _centred(x, epsilon)
    normal, wide = centred * inverse, dy.astype(jnp.float32)
    d_normal = wide * scale
    along = (d_normal * normal).mean(-1, keepdims=True)
    dx = inverse * (d_normal - d_normal.mean(-1, keepdims=True) - normal * along)
    leading = tuple(range(x.ndim - 1))
    d_bias = None if bias is None else wide.sum(leading)
    return dx.astype(x.dtype), (wide * normal).sum(leading), d_bias


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nn.Module):
    """LayerNorm with a float32 parameter `scale` [D] and, if asked for, `bias` [D].

    Attributes:
        use_bias: whether there is a bias; it starts at zero.
        dtype: of the result.
        epsilon: added to the variance.
    """

    use_bias: bool
    dtype: str
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., D] for [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else None
        return normalise(x.astype(self.dtype), scale, bias, self.epsilon)
