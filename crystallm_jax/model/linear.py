"""Linear layers and table lookups whose gradients are summed in float32 by matrix products.

Flax's own layer asks for results in the type of the operands. In bfloat16 that rounds every weight gradient to 8 bits
before the optimiser sees it, and on CPUs with matrix units it misses the fast kernels, which write float32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from crystallm_jax.model.precision import matmul_precision

# What `remat: dots` keeps for the backward pass.
LINEAR_OUTPUT = "linear"

# Tokens that a CPU's weight-gradient product sums at a time: a transposed operand in slices of this length is laid
# out anew and reaches the fast kernel, a whole one does not (measured: 4 times at width 256, 1.5 times at 1,024).
_GRADIENT_TOKENS = 1024


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """X [..., D] times a float32 kernel [D, *E] in x's dtype, summed in float32: [..., *E] in x's dtype."""
    return _product(x, kernel.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    summed = tuple(range(x.ndim - 1, dy.ndim)), tuple(range(1, kernel.ndim))
    dx = _product(dy, kernel.astype(x.dtype), summed).astype(x.dtype)
    return dx, _transposed_product(x, dy, kernel.shape[1:]).astype(kernel.dtype)


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def tied_logits(x: jax.Array, table: jax.Array) -> jax.Array:
    """X [..., D] times the transpose of a float32 table [V, D] in x's dtype: float32 [..., V].

    The gradient that comes in is taken in x's dtype.
    """
    return _product(x, table.astype(x.dtype), ((x.ndim - 1,), (1,)))


def _tied_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return tied_logits(x, table), (x, table)


def _tied_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, table = saved
    dy = dy.astype(x.dtype)
    dx = _product(dy, table.astype(x.dtype), ((dy.ndim - 1,), (0,))).astype(x.dtype)
    return dx, _transposed_product(dy, x, table.shape[1:])


tied_logits.defvjp(_tied_forward, _tied_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of a float32 table [N, D] by int ids [...]: float32 [..., D].

    Its gradient is a product with one-hot rows: adding into few rows many times one after the other, which a gather's
    own gradient does, is what accelerators do slowest. The product takes the incoming gradient in `dtype`, the
    arithmetic of what reads the rows, whose gradients have no more digits.
    """
    del dtype
    return jnp.take(table, ids, axis=0)


def _look(table: jax.Array, ids: jax.Array, dtype: str) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return lookup(table, ids, dtype), (ids, table.shape[0])


def _unlook(dtype: str, saved: tuple[jax.Array, int], dy: jax.Array) -> tuple[jax.Array, None]:
    ids, count = saved
    return _transposed_product(jax.nn.one_hot(ids, count, dtype=dtype), dy.astype(dtype), dy.shape[-1:]), None


lookup.defvjp(_look, _unlook)


def _transposed_product(x: jax.Array, dy: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """The sum over all leading axes of x [..., D] times dy [..., *E], float32 [D, *E]."""
    leading = tuple(range(x.ndim - 1))

    def whole(x: jax.Array, dy: jax.Array) -> jax.Array:
        return _product(x, dy, (leading, leading))

    def in_slices(x: jax.Array, dy: jax.Array) -> jax.Array:
        rows, gradients = x.reshape(-1, x.shape[-1]), dy.reshape(-1, math.prod(features))
        # The narrower of the two is laid out anew.
        if rows.shape[1] > gradients.shape[1]:
            return _sliced_product(gradients, rows).T.reshape(x.shape[-1], *features)
        return _sliced_product(rows, gradients).reshape(x.shape[-1], *features)

    return jax.lax.platform_dependent(x, dy, cpu=in_slices, default=whole)


def _sliced_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The transpose of a [N, D] times b [N, E], float32 [D, E], some rows at a time."""
    a_transposed = a.T
    parts = [
        _product(
            a_transposed[:, first : first + _GRADIENT_TOKENS],
            b[first : first + _GRADIENT_TOKENS],
            ((1,), (0,)),
        )
        for first in range(0, len(b), _GRADIENT_TOKENS)
    ]
    return sum(parts[1:], parts[0])


def _product(
    a: jax.Array,
    b: jax.Array,
    summed: tuple[tuple[int, ...], tuple[int, ...]],
) -> jax.Array:
    """Contract axes of each; float32."""
    return jax.lax.dot_general(
        a,
        b,
        (summed, ((), ())),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


class Linear(nn.Module):
    """A linear layer with parameters `kernel` [D, *E] and, if asked for, `bias` [*E], both float32.

    Attributes:
        features: E, one axis or several.
        use_bias: whether there is a bias; it starts at zero.
        dtype: of the arithmetic.
        std: of the kernel's initialisation.
    """

    features: tuple[int, ...]
    use_bias: bool
    dtype: str
    std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., *E] for [..., D]."""
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], *self.features))
        y = linear(x.astype(self.dtype), kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features).astype(self.dtype)
        return checkpoint_name(y, LINEAR_OUTPUT)
