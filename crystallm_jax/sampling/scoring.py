"""How probable texts are to the model: read side by side, as prompts are."""

from collections.abc import Sequence

import numpy as np

from crystallm_jax.errors import ModelError
from crystallm_jax.model import ModelConfig
from crystallm_jax.model.inference import prepared_weights
from crystallm_jax.sampling.reader import read_texts

# Tokens that are read at once: each is compared with all of them.
_MOST = 1024
_PAGE = 16


def score_texts(config: ModelConfig, params: dict, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The log-probability of each token but the first, given those before it: float64 [T - 1] a text, in nats.

    Args:
        config: the model's shape, unrolled.
        params: of the model.
        texts: int [T] each.

    Raises:
        ModelError: a text is empty, or has more tokens than the context and one that follows it.
    """
    for number, text in enumerate(texts):
        if not 1 <= len(text) <= config.block_size + 1:
            raise ModelError(
                f"text {number} has {len(text)} tokens: from 1 to {config.block_size + 1} can be scored with a"
                f" context of {config.block_size}"
            )
    weights, found = prepared_weights(config, params), []
    for reads in read_texts(config, weights, texts, page=_PAGE, dtype=config.dtype, most=_MOST):
        log_probs = np.asarray(reads[0].reading.log_probs, np.float64)
        found += [log_probs[read.number] for read in reads]
    return [row[1 : len(text)] for row, text in zip(found, texts, strict=True)]
