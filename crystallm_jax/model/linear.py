"""Linear layers whose products are summed in float32, forwards and backwards.

Flax's own asks for results in the type of the operands. In bfloat16 that rounds every weight gradient to 8 bits
before the optimiser sees it, and on CPUs with matrix units it misses the fast kernels, which write float32.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from crystallm_jax.model.attention import matmul_precision

# Tokens that a CPU's weight-gradient product sums at a time: a transposed operand in slices of this length is laid
# out anew and reaches the fast kernel, a whole one does not (measured: 4 times at width 256, 1.5 times at 1,024).
_GRADIENT_TOKENS = 1024


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """X [..., D] times a float32 kernel [D, E] in x's dtype, summed in float32: [..., E] in x's dtype."""
    return _product(x, kernel.astype(x.dtype), (x.ndim - 1, 0)).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = _product(dy, kernel.astype(x.dtype), (dy.ndim - 1, 1)).astype(x.dtype)
    rows, gradients = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    step = _GRADIENT_TOKENS if jax.default_backend() == "cpu" else len(rows)
    transposed = rows.T
    parts = [
        _product(transposed[:, first : first + step], gradients[first : first + step], (1, 0))
        for first in range(0, len(rows), step)
    ]
    return dx, sum(parts[1:], parts[0]).astype(kernel.dtype)


linear.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Contract one axis of each; float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, numbers, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32
    )


class Linear(nn.Module):
    """A linear layer with parameters `kernel` [D, E] and, if asked for, `bias` [E], both float32.

    Attributes:
        features: E.
        use_bias: whether there is a bias; it starts at zero.
        dtype: of the arithmetic.
        std: of the kernel's initialisation.
    """

    features: int
    use_bias: bool
    dtype: str
    std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., E] for [..., D]."""
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        y = linear(x.astype(self.dtype), kernel)
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
