"""The Python interface: a model that answers with logits and with samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.config import find_config, load_config
from crystallm_jax.errors import ModelError
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.model.config import DType
from crystallm_jax.models.kinds import read_model
from crystallm_jax.numpy_model.loaded import LoadedModel, checked_tokens, encode_prompt, encode_text
from crystallm_jax.samples import Sample
from crystallm_jax.sampling.constrain import Level
from crystallm_jax.sampling.generate import generate
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.requests import Completion, GenerationRequest, Orders
from crystallm_jax.sampling.scoring import score_texts
from crystallm_jax.train_run.train_config import TrainConfig


@dataclass(frozen=True, eq=False)
class CrystalModel(LoadedModel):
    """A language model of crystals: its shape, its parameters, its tokenizer.

    Attributes:
        config: the shape and arithmetic.
        params: nested float32 parameters, or whatever they were cast to.
        name: where it came from.
    """

    def logits(self, tokens: Any) -> jax.Array:
        """Next-token logits, float32 [B, T, V], for int tokens [B, T]; compiled once a shape.

        Raises:
            ModelError: not two-dimensional, longer than the context, or ids outside the vocabulary.
        """
        tokens = checked_tokens(tokens, self.config)
        return _logits(self.config, self.params, jnp.asarray(tokens, jnp.int32))

    def generate(
        self,
        prompts: str | Sequence[str],
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = 10,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        constrain: Level | None = None,
        overflow: Literal["stop", "slide"] = "stop",
    ) -> list[Sample]:
        """Complete prompts; the samples come in the order of (prompt, sample).

        Args:
            prompts: texts made by `make_prompt`, or `data_` alone for anything.
            num_samples: samples a prompt.
            temperature: logits are divided by it.
            top_k: only the k most likely tokens can be drawn; 1 is greedy, None draws from all.
            max_new_tokens: most tokens to add; None goes on to the end of the context.
            seed: of all randomness: the same sample for the same (seed, prompt, sample index).
            batch_size: rows decoded together; it changes no sample. None takes 64 on a CPU, 512 elsewhere.
            constrain: what every sample is held to: `syntax`, `composition`, `symmetry` or `positions`;
                None to nothing.
            overflow: at the context's end, `stop` or (published, slow) `slide`.

        Raises:
            SamplingError: a prompt or setting that cannot be honoured.
        """
        request = GenerationRequest(
            method=SamplingMethod(temperature=temperature, top_k=top_k),
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
            overflow=overflow,
            constrain=constrain,
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        samples = [sample for batch in self.generate_batches(texts, request) for sample in batch]
        return sorted(samples, key=lambda sample: (sample.prompt_index, sample.sample_index))

    def generate_batches(
        self, prompts: Sequence[str], request: GenerationRequest, orders: Orders | None = None
    ) -> Iterator[list[Sample]]:
        """Complete prompts, yielding samples as they are done, in whatever order.

        Args:
            prompts: all that `orders` may name.
            request: how to sample.
            orders: which samples to make; None makes `num_samples` of each prompt.

        Raises:
            SamplingError: a prompt that is no prompt or leaves no room.
        """
        newline_id = self.tokenizer.token_to_id["\n"]
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        batches = generate(
            self.config, self.params, encoded, newline_id=newline_id, request=request, orders=orders
        )
        for batch in batches:
            yield [self._sample(completion) for completion in batch]

    def token_log_probs(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Log-probability of each token of a text but the first, given those before it: float64 [T - 1], in nats.

        Args:
            texts: of the dialect, as `stream_text` gives them and samples have them in `.text`.

        Raises:
            ModelError: a text that is none of the dialect, or longer than the context.
        """
        encoded = [encode_text(text, self.tokenizer) for text in texts]
        return score_texts(self.config, self.params, encoded)

    def log_prob(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Natural log of each text's probability, float64 [N].

        Args:
            texts: as `token_log_probs` takes them.
            prompts: what each text begins with and is given, so that it does not count; None counts all but `data_`.

        Raises:
            ModelError: as `token_log_probs`; or a prompt that its text does not begin with.
        """
        scored = self.token_log_probs(texts)
        counted = [1] * len(texts)
        if prompts is not None:
            for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
                given, ids = (encode_text(part, self.tokenizer) for part in (prompt, text))
                if not np.array_equal(given, ids[: len(given)]):
                    raise ModelError(f"text {number} does not begin with its prompt {prompt[:40]!r}")
                counted[number] = len(given)
        return np.array([row[count - 1 :].sum() for row, count in zip(scored, counted, strict=True)])

    def _sample(self, completion: Completion) -> Sample:
        return Sample(text=self.tokenizer.decode(completion.token_ids), **completion._asdict())


def load_model(path_or_name: str | Path = "default", *, dtype: DType = "float32") -> CrystalModel:
    """Load a model of any format.

    Args:
        path_or_name: a run folder or one of its checkpoints, a model folder, a Hugging Face folder, a published
            `ckpt.pt` or its archive, `model.npz`; or a name: `default` (the one in the package), `hf:owner/name`, or a
            published model (`crystallm_v1_small`), which is downloaded the first time.
        dtype: arithmetic of the blocks; bfloat16 is faster on accelerators and gives other samples.

    Raises:
        ModelError: nothing of the kind is there, or it is damaged.
    """
    weights = read_model(path_or_name)
    # Dropout is for training; the published code's leaks into sampling, ours does not.
    config = replace(weights.config, dtype=dtype, dropout=0.0, attention_dropout=None, attention="auto")
    return CrystalModel(config, jax.device_put(weights.params), str(path_or_name))


def new_model(config: str | Path | ModelConfig, seed: int = 0) -> CrystalModel:
    """A freshly initialised model, for tests and benchmarks.

    Args:
        config: a training configuration (path or name), or the shape itself.
        seed: of the initialisation.

    Raises:
        ConfigError: no such configuration.
    """
    name = "" if isinstance(config, ModelConfig) else str(config)
    if not isinstance(config, ModelConfig):
        settings = load_config(TrainConfig, find_config(config))
        config = replace(settings.model_config(CIFTokenizer().vocab_size), dtype="float32")
    return CrystalModel(config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed)), name)


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, tokens: jax.Array) -> jax.Array:
    return GPT(config).apply({"params": params}, tokens)
