"""The random numbers of `jax.random`, bit for bit, in NumPy: Threefry-2x32 with 20 rounds (Salmon et al. 2011).

A number is a function of a key and of its place alone, so those of a few places cost no more than these. A key is two
words, uint32 [..., 2]. As in JAX with its default settings: partitionable, 32 bits.
"""

import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_GROUPS = 5
_WORD = 32
# Of float32: bits that are not of the mantissa, and one as bits.
_BEFORE_MANTISSA, _ONE = np.uint32(9), np.uint32(0x3F800000)
_TINY = np.finfo(np.float32).tiny


def root_key(seed: int) -> np.ndarray:
    """The key of a seed below 2**32: `jax.random.key(seed)`."""
    return np.array([0, seed], np.uint32)


def fold_in(keys: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Keys made of keys [..., 2] and numbers [...], uint32 each: `jax.random.fold_in`."""
    return np.stack(_hashed(keys, np.asarray(data, np.uint32)), axis=-1)


def bits(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Uint32 [..., K]: what `jax.random.bits(key, [N])` has at some places [..., K], for each of the keys [..., 2]."""
    first, second = _hashed(keys[..., None, :], np.asarray(places, np.uint32))
    return first ^ second


def uniform(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Float32 [..., K] above 0 and below 1: `jax.random.uniform` with the least normal number as its minimum."""
    floats = (bits(keys, places) >> _BEFORE_MANTISSA | _ONE).view(np.float32) - np.float32(1)
    return np.maximum(floats + _TINY, _TINY)


def gumbel(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Float32 [..., K] from Gumbel's distribution: `jax.random.gumbel`, up to the rounding of logarithms."""
    return -np.log(-np.log(uniform(keys, places)))


def _hashed(keys: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two words each for keys [..., 2] and a counter of which the upper word is 0."""
    key_0, key_1 = keys[..., 0], keys[..., 1]
    schedule = (key_1, key_0 ^ key_1 ^ _PARITY, key_0)
    # Of an axis at least: what NumPy makes of none are scalars, which cannot be changed in place.
    y = np.atleast_1d(low + key_1)
    x = np.broadcast_to(key_0, y.shape).copy()
    spare = np.empty_like(y)
    for group in range(_GROUPS):
        for turn in _ROTATIONS[group % 2]:
            x += y
            np.right_shift(y, np.uint32(_WORD - turn), out=spare)
            np.left_shift(y, np.uint32(turn), out=y)
            y |= spare
            y ^= x
        x += schedule[group % 3]
        y += schedule[(group + 1) % 3] + np.uint32(group + 1)
    shape = np.broadcast_shapes(key_0.shape, low.shape)
    return x.reshape(shape), y.reshape(shape)
