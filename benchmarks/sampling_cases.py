"""The cases of `sampling.py`: what is varied, in which order, and the least time that each can take.

Needs Python alone.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from train_step_cases import MODELS, VOCAB_SIZE

PROMPT_TOKENS = 12
# What a structure has on average, which tokens are counted in structures by.
STRUCTURE_TOKENS = 350
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """One way to sample from one model. Names and values are those of the command line.

    Attributes:
        framework: `jax`, this package; `transformers`, or `published`, its peers.
        model: `small` or `large`.
        batch_size: rows decoded together.
        new_tokens: of each row, `350`; or `100-1000`, uniformly between the two.
        dtype: arithmetic and parameters.
        cache_dtype: of keys and values; `model` is the same as `dtype`.
    """

    framework: str = "jax"
    model: str = "small"
    batch_size: int = 32
    new_tokens: str = "256"
    dtype: str = "float32"
    cache_dtype: str = "model"

    def peer(self) -> "Case":
        """The same in `transformers`, whose cache is of the model's type."""
        return replace(self, framework="transformers", cache_dtype="model")

    def published(self) -> "Case":
        """A structure in the published way, one at a time: for any batch and length the same."""
        return replace(
            self,
            framework="published",
            batch_size=1,
            new_tokens=str(STRUCTURE_TOKENS),
            cache_dtype="model",
        )

    def describe(self) -> dict[str, Any]:
        """As it stands in the report."""
        return asdict(self)

    def limits(self, waves: int) -> list[int]:
        """New tokens of each row: a batch of equal ones, or `waves` batches of rows that differ.

        The same for every framework and every run.
        """
        least, _, most = self.new_tokens.partition("-")
        if not most:
            return [int(least)] * self.batch_size
        draw = random.Random(0)
        return [draw.randint(int(least), int(most)) for _ in range(waves * self.batch_size)]

    def why_not(self) -> str | None:
        """Why this cannot run, or None."""
        longest = int(self.new_tokens.rpartition("-")[2])
        if PROMPT_TOKENS + longest > MODELS[self.model]["block_size"]:
            return f"{PROMPT_TOKENS} + {longest} tokens do not fit the context"
        return None


def prompts_of(rows: int) -> list[list[int]]:
    """Random token ids, so that no two rows share a prompt: [rows, 12]."""
    draw = random.Random(1)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]


def bytes_to_read(case: Case, limits: Sequence[int]) -> dict[str, int]:
    """What decoding rows of these lengths must read from memory, if nothing stays in a cache.

    weights: each step reads all parameters but the table of positions once, for all rows. The least number of steps is
    that of the longest row, or all tokens over the batch, whichever is more.
    cache: the step that draws a row's token t (from 0) reads keys and values of the prompt and of t tokens, in each
    layer. Nothing is counted for writing them, for reading the prompt, or for activations.
    """
    shape = MODELS[case.model]
    layers, width = shape["n_layer"], shape["n_embd"]
    # Attention 4 D², feed-forward 8 D², two scales of D a layer; the tied head; the last scale.
    parameters = layers * (12 * width**2 + 2 * width) + VOCAB_SIZE * width + width
    steps = max(*limits, -(-sum(limits) // case.batch_size))
    filled = sum(PROMPT_TOKENS * n + n * (n - 1) // 2 for n in limits)
    kept = case.dtype if case.cache_dtype == "model" else case.cache_dtype
    return {
        "steps": steps,
        "weights": steps * parameters * ITEM_BYTES[case.dtype],
        "cache": filled * 2 * layers * width * ITEM_BYTES[kept],
    }


# What is tried, the best guess first.
BATCHES: Mapping[str, Sequence[int]] = {
    "gpu": (1024, 256, 64, 1),
    "tpu": (1024, 256, 64, 1),
    "cpu": (32, 8, 1),
}
# 550 is the mean of 100-1000: what mixed lengths are held against.
LENGTHS: Mapping[str, Sequence[str]] = {
    "gpu": ("350", "256", "1000", "550", "100-1000"),
    "tpu": ("350", "256", "1000", "550", "100-1000"),
    "cpu": ("256", "350", "550", "100-1000", "1000"),
}
DTYPES: Mapping[str, Sequence[str]] = {
    "gpu": ("bfloat16", "float32"),
    "tpu": ("bfloat16", "float32"),
    "cpu": ("float32",),
}


def sweep(
    platform: str, models: Sequence[str], given: Mapping[str, Sequence[Any]], *, peers: Sequence[str]
) -> list[Case]:
    """Cases in order of interest: the best guess for each model, then what differs from it in one setting, then more.

    Args:
        platform: `gpu`, `tpu` or `cpu`.
        models: by name.
        given: values of settings that replace those tried by default.
        peers: of `transformers` and `published`: each follows the first case that it is the peer of.
    """
    tried: dict[str, Sequence[Any]] = {
        "batch_size": BATCHES[platform],
        "new_tokens": LENGTHS[platform],
        "dtype": DTYPES[platform],
        "cache_dtype": ("model",),
        **given,
    }
    places = itertools.product(*(range(len(values)) for values in tried.values()))
    ranked = sorted(places, key=lambda place: (sum(at > 0 for at in place), place))
    cases: list[Case] = []
    for place in ranked:
        chosen = {name: values[at] for (name, values), at in zip(tried.items(), place, strict=True)}
        for model in models:
            case = Case(model=model, **chosen)
            found = {"transformers": case.peer(), "published": case.published()}
            cases.append(case)
            cases += [found[peer] for peer in peers if found[peer] not in cases]
    return cases
