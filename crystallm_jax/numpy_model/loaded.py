"""What models have in common, whatever computes them."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.errors import ModelError, SamplingError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.published_names import parameter_table


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A language model of crystals: its shape, its parameters, its tokenizer.

    Attributes:
        config: the shape and arithmetic.
        params: nested parameters of an unrolled model.
        name: where it came from.
    """

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    name: str = ""

    @cached_property
    def tokenizer(self) -> CIFTokenizer:
        """The tokenizer of the published vocabulary."""
        return CIFTokenizer()

    @property
    def num_params(self) -> int:
        """Number of parameters, the tied head counted once."""
        return sum(math.prod(entry.shape) for entry in parameter_table(self.config).values())


def checked_tokens(tokens: Any, config: ModelConfig) -> np.ndarray:
    """Int tokens [B, T] that a model can read.

    Raises:
        ModelError: not two-dimensional, longer than the context, or ids outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ModelError(f"tokens of shape {tokens.shape} and type {tokens.dtype}: expected integers [B, T]")
    if tokens.shape[1] > config.block_size:
        raise ModelError(f"{tokens.shape[1]} tokens do not fit the context of {config.block_size}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ModelError(f"token ids must lie within 0 and {config.vocab_size - 1}")
    return tokens


def encode_prompt(prompt: str, tokenizer: CIFTokenizer) -> np.ndarray:
    """The ids of a prompt.

    Raises:
        SamplingError: it is no prompt, or the vocabulary lacks a part of it.
    """
    if not prompt.startswith("data_"):
        raise SamplingError(f"prompt {prompt[:40]!r} does not begin with data_: make it with make_prompt")
    ids = tokenizer.encode_cif(prompt)
    if not _is_whole(ids, prompt, tokenizer):
        raise SamplingError(
            f"prompt {prompt[:40]!r} has words or characters that the vocabulary lacks: make it with make_prompt"
        )
    return ids


def encode_text(text: str, tokenizer: CIFTokenizer) -> np.ndarray:
    """The ids of a text in the dialect.

    Raises:
        ModelError: it does not begin as one, or the vocabulary lacks a part of it.
    """
    ids = tokenizer.encode_cif(text)
    if not text.startswith("data_") or not _is_whole(ids, text, tokenizer):
        raise ModelError(
            f"text {text[:40]!r} is none of the dialect: prepare it with preprocess_cif and stream_text"
        )
    return ids


def _is_whole(ids: np.ndarray, text: str, tokenizer: CIFTokenizer) -> bool:
    """Whether ids are all of a text: the tokenizer skips characters that it does not know."""
    return tokenizer.decode(ids) == re.sub(r"[ \t]+", " ", text) and not (ids == tokenizer.unk_id).any()
