"""Attention of many tokens at once, of several texts side by side: how prompts, and runs that are forced, are read.

N columns: tokens of several texts, each text in one piece and in order    S positions of a page
C pages of what the texts had before
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.model.pages import Pages
from crystallm_jax.model.precision import matmul_precision


class Before(NamedTuple):
    """What the texts had before the columns.

    Attributes:
        pages: C of them.
        fill: int32 [C]; how many positions of each are taken.
        text: int32 [C]; whose each is, as numbered in the columns; -1 where nobody's.
    """

    pages: Pages
    fill: jax.Array | np.ndarray
    text: jax.Array | np.ndarray


def attend_columns(
    q_HdN: jax.Array,
    k_HdN: jax.Array,
    v_HdN: jax.Array,
    *,
    layer: int,
    text: jax.Array,
    before: Before | None,
) -> jax.Array:
    """Each column's attention to those of its text up to itself, and to what its text had before: float32 [H, d, N].

    Softmax and sums in float32.

    Args:
        q_HdN: queries.
        k_HdN: keys.
        v_HdN: values.
        layer: whose pages of `before` are meant.
        text: int32 [N]; which text each column is of.
        before: None where every text begins here.
    """
    precision = matmul_precision(q_HdN.dtype)
    H, d, N = q_HdN.shape
    scale = 1 / math.sqrt(d)

    def scores_of(keys_HdM: jax.Array, visible_NM: jax.Array) -> jax.Array:
        scores = jnp.einsum(
            "HdN,HdM->HNM", q_HdN, keys_HdM, precision=precision, preferred_element_type=jnp.float32
        )
        return jnp.where(visible_NM, scores * scale, -jnp.inf)

    visible = (text[:, None] == text) & jnp.tri(N, dtype=bool)
    scores, values = [scores_of(k_HdN, visible)], [v_HdN]
    if before is not None:
        keys, mixed = before.pages.keys[layer], before.pages.values[layer]
        S = keys.shape[-1]
        taken = jnp.arange(S) < before.fill[:, None]
        seen = (text[:, None, None] == before.text[:, None]) & taken
        scores.append(scores_of(keys.transpose(1, 2, 0, 3).reshape(H, d, -1), seen.reshape(N, -1)))
        values.append(mixed.transpose(1, 3, 0, 2).reshape(H, d, -1))
    peaks = jnp.max(jnp.stack([part.max(-1) for part in scores]), axis=0)[..., None]
    weights = [jnp.exp(part - peaks) for part in scores]
    mixed_HdN = sum(
        jnp.einsum(
            "HNM,HdM->HdN",
            part.astype(of.dtype),
            of,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        for part, of in zip(weights, values, strict=True)
    )
    sums_HN = sum(part.sum(-1) for part in weights)
    return jnp.asarray(mixed_HdN) / jnp.asarray(sums_HN)[:, None]
