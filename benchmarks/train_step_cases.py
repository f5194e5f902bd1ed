"""The cases of `train_step.py`: what is varied, and in which order. Needs Python alone."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

VOCAB_SIZE = 371

# The published shapes: layers, heads, width, context.
MODELS: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 1024},
    "large": {"n_layer": 16, "n_head": 16, "n_embd": 1024, "block_size": 2048},
}


@dataclass(frozen=True)
class Case:
    """One way to train one model. Names and values are those of the configuration files.

    Attributes:
        framework: `jax`, this package, or `torch`, its peer.
        model: `small` or `large`.
        batch_size: sequences a micro-batch.
        remat: of the backward pass.
        attention: implementation.
        dtype: arithmetic.
        layers: unrolled or scanned.
        windows: `starts`, or `packed` rows of three records.
        dropout: after embeddings and branches.
        attention_dropout: on attention probabilities.
    """

    framework: str = "jax"
    model: str = "small"
    batch_size: int = 32
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "bfloat16"
    layers: str = "unrolled"
    windows: str = "starts"
    dropout: float = 0.1
    attention_dropout: float = 0.0

    def peer(self) -> "Case":
        """The same in PyTorch, where nothing is rematerialised and the rest is not ours to choose."""
        return replace(
            self, framework="torch", remat="none", attention="sdpa", layers="unrolled", windows="starts"
        )

    def changes(self, other: "Case") -> int:
        """How many settings differ."""
        return sum(getattr(self, field.name) != getattr(other, field.name) for field in fields(self))

    def describe(self) -> dict[str, object]:
        """As it stands in the report."""
        return asdict(self)

    def why_not(self, platform: str) -> str | None:
        """Why this cannot run there, or None."""
        if self.attention == "cudnn" and platform != "gpu":
            return "cuDNN needs an NVIDIA GPU"
        if self.attention == "splash" and platform != "tpu":
            return "splash attention needs a TPU"
        if self.attention in ("cudnn", "splash") and self.attention_dropout > 0:
            return "the fused kernels have no dropout on attention probabilities"
        if self.attention == "cudnn" and self.dtype == "float32":
            return "cuDNN attention takes 16-bit numbers alone"
        return None


# What is tried, the best guess first; the batches are by model.
BATCHES: Mapping[str, Mapping[str, Sequence[int]]] = {
    "gpu": {"small": (64, 32, 128, 256), "large": (16, 8, 32)},
    "tpu": {"small": (32, 16, 64), "large": (8, 4, 16)},
    "cpu": {"small": (2, 4), "large": (1, 2)},
}
SETTINGS: Mapping[str, Mapping[str, Sequence[object]]] = {
    "gpu": {
        "layers": ("unrolled", "scanned"),
        "remat": ("none", "dots", "full"),
        "attention": ("auto", "xla"),
        "windows": ("starts", "packed"),
        "attention_dropout": (0.0, 0.1),
        "dropout": (0.1, 0.0),
        "dtype": ("bfloat16", "float32"),
    },
    "tpu": {
        "layers": ("scanned", "unrolled"),
        "remat": ("none", "dots", "full"),
        "attention": ("auto", "splash", "xla"),
        "windows": ("starts", "packed"),
        "attention_dropout": (0.0, 0.1),
        "dropout": (0.1, 0.0),
        "dtype": ("bfloat16", "float32"),
    },
    "cpu": {
        "layers": ("unrolled", "scanned"),
        "remat": ("none", "dots"),
        "attention": ("auto", "xla"),
        "attention_dropout": (0.0,),
        "dropout": (0.0, 0.1),
        "dtype": ("bfloat16", "float32"),
    },
}


def sweep(
    platform: str,
    models: Sequence[str],
    given: Mapping[str, Sequence[object]],
    *,
    differences: int,
    peer: bool,
) -> list[Case]:
    """Cases in order of interest: the best guess for each model, then what differs from it in one setting, then two.

    Args:
        platform: `gpu`, `tpu` or `cpu`.
        models: by name.
        given: values of settings that replace those tried by default.
        differences: greatest number of settings that differ from the best guess.
        peer: whether each case is followed by its peer in PyTorch, the first time that it has one.
    """
    tried = {
        model: {"batch_size": BATCHES[platform][model], **SETTINGS[platform], **given} for model in models
    }
    ordered = sorted(
        (found for model in models for found in _ranked(model, tried[model])), key=lambda found: found[0]
    )
    cases: list[Case] = []
    for rank, case in ordered:
        if rank[0] > differences:
            break
        cases.append(case)
        if peer and case.peer() not in cases:
            cases.append(case.peer())
    return cases


def _ranked(
    model: str, tried: Mapping[str, Sequence[object]]
) -> Iterator[tuple[tuple[int, list[int], tuple[int, ...]], Case]]:
    """Every case of a model with its rank: how many settings differ from the first values, which, and how far."""
    for places in itertools.product(*(range(len(values)) for values in tried.values())):
        chosen: dict[str, Any] = {
            name: values[place] for (name, values), place in zip(tried.items(), places, strict=True)
        }
        changed = [setting for setting, place in enumerate(places) if place > 0]
        yield (len(changed), changed, places), Case(model=model, **chosen)
