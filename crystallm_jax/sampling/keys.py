"""The randomness of a sample: a function of the seed, its prompt and its number, and of nothing else."""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from crystallm_jax.sampling.requests import Wanted
from crystallm_jax.sampling.shapes import padded, padded_rows


class PromptKeys:
    """Keys of samples, by the prompts' tokens and how often each came before in the list.

    Args:
        prompts: int [T] each.
        seed: of all of them.
    """

    def __init__(self, prompts: Sequence[np.ndarray], seed: int) -> None:
        self._root = np.asarray(jax.random.key_data(jax.random.key(seed)))
        seen: dict[bytes, int] = {}
        self._identities = np.zeros((len(prompts), 2), np.uint32)
        for index, prompt in enumerate(prompts):
            content = np.asarray(prompt, "<u2").tobytes()
            occurrence = seen[content] = seen.get(content, -1) + 1
            self._identities[index] = zlib.crc32(content), occurrence

    def of(self, wanted: Sequence[Wanted], where: Sharding) -> np.ndarray:
        """The data of each sample's key, uint32 [R, ...]; computed there, for other devices may be busy."""
        names = np.zeros((len(wanted), 3), np.uint32)
        for name, one in zip(names, wanted, strict=True):
            name[:2], name[2] = self._identities[one.prompt_index], one.sample_index
        size = padded_rows(len(names))
        placed = jax.device_put((self._root, padded(names, size, fill=0)), where)
        return np.asarray(_keys(*placed))[: len(names)]


@jax.jit
def _keys(root: jax.Array, names: jax.Array) -> jax.Array:
    def one(name: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(root)
        for part in name:
            key = jax.random.fold_in(key, part)
        return jax.random.key_data(key)

    return jnp.asarray(jax.vmap(one)(names))
