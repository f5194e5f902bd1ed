"""A model that runs on NumPy alone, and its file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.errors import SamplingError
from crystallm_jax.models.model import Model
from crystallm_jax.models.npz import StoredType, read_npz, write_npz
from crystallm_jax.numpy_model.loaded import LoadedModel, checked_tokens, encode_prompt
from crystallm_jax.numpy_model.network import Network, prepare, whole_logits
from crystallm_jax.numpy_model.sampling import Completion, Request, complete
from crystallm_jax.samples import Sample

# Tokens read at once at most by `logits`, for its attention takes memory in their square.
_TOGETHER = 4096


@dataclass(frozen=True, eq=False)
class NumpyModel(LoadedModel):
    """A language model of crystals on NumPy: its shape, its parameters, its tokenizer.

    Attributes:
        config: the shape; the arithmetic is float32.
        params: nested float32 parameters.
        name: where it came from.
    """

    @cached_property
    def network(self) -> Network:
        """The parameters as they are computed with."""
        return prepare(self.config, self.params)

    def logits(self, tokens: Any) -> np.ndarray:
        """Next-token logits, float32 [B, T, V], for int tokens [B, T].

        Raises:
            ModelError: not two-dimensional, longer than the context, or ids outside the vocabulary.
        """
        tokens = checked_tokens(tokens, self.config)
        together = max(1, _TOGETHER // max(tokens.shape[1], 1))
        out = np.empty((*tokens.shape, self.config.vocab_size), np.float32)
        for begin in range(0, tokens.size and len(tokens), together):
            out[begin : begin + together] = whole_logits(self.network, tokens[begin : begin + together])
        return out

    def generate(
        self,
        prompts: str | Sequence[str],
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = 10,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        constrain: None = None,
        overflow: str = "stop",
    ) -> list[Sample]:
        """Complete prompts; the samples come in the order of (prompt, sample).

        They are those that the JAX model draws with the same seed, but where two tokens tie to the last digits. NumPy
        shares products out over all cores; on a machine that is busy with other work, starting with
        OPENBLAS_NUM_THREADS=1 in the environment is several times as fast.

        Args:
            prompts: texts made by `make_prompt`, or `data_` alone for anything.
            num_samples: samples a prompt.
            temperature: logits are divided by it.
            top_k: only the k most likely tokens can be drawn; 1 is greedy, None draws from all.
            max_new_tokens: most tokens to add; None goes on to the end of the context.
            seed: of all randomness: the same sample for the same (seed, prompt, sample index).
            batch_size: rows decoded together; it changes no sample. None takes 32, or fewer of a large model.
            constrain: None; the JAX model alone can hold samples to anything.
            overflow: `stop`; the JAX model alone goes on beyond the context's end.

        Raises:
            SamplingError: a prompt or setting that cannot be honoured.
        """
        if constrain is not None:
            raise SamplingError(
                f"constrain={constrain!r}: a NumPy model samples freely; convert it and use load_model"
            )
        if overflow != "stop":
            raise SamplingError(
                f"overflow={overflow!r}: a NumPy model stops at the context's end; convert it and use load_model"
            )
        request = Request(num_samples, temperature, top_k, max_new_tokens, seed, batch_size)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [encode_prompt(text, self.tokenizer) for text in texts]
        completions = complete(self.network, encoded, newline_id=self.tokenizer.newline_id, request=request)
        return sorted(map(self._sample, completions), key=lambda one: (one.prompt_index, one.sample_index))

    def _sample(self, completion: Completion) -> Sample:
        return Sample(text=self.tokenizer.decode(completion.token_ids), **completion._asdict())


def load_numpy(path: str | Path) -> NumpyModel:
    """Load a model from an `.npz` file, to be run on NumPy alone.

    Raises:
        ModelError: not such a file, or a damaged one.
    """
    weights = read_npz(path)
    config = replace(weights.config, dtype="float32", dropout=0.0, attention_dropout=None)
    return NumpyModel(config, weights.params, str(path))


def save_numpy(model: LoadedModel, path: str | Path, *, dtype: StoredType = "float32") -> None:
    """Write a model as an `.npz` file for `load_numpy`.

    Args:
        model: of either kind.
        path: the file; one that is there is replaced.
        dtype: of the matrices in the file: float32, float16, bfloat16 or int8.

    Raises:
        ModelError: it cannot be written.
    """
    write_npz(path, Model(model.config, model.params), dtype=dtype)
