"""What every format of a model is read into and written from."""

from dataclasses import dataclass, field
from typing import Any

from crystallm_jax.model.config import ModelConfig

# A nested dict of arrays, in the unrolled layout of `GPT`.
Tree = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Moments:
    """AdamW's state.

    Attributes:
        updates: how many were made.
        first: running means of the gradients, a tree like the parameters.
        second: running means of their squares, likewise.
    """

    updates: int
    first: Tree = field(repr=False)
    second: Tree = field(repr=False)


@dataclass(frozen=True)
class Training:
    """Where a model's training stands.

    Attributes:
        step: optimiser steps taken.
        best_val_loss: the lowest validation loss so far, nats a token; None where it is not known.
        settings: of the run, under the published names.
        moments: of the optimiser; None where they were not kept.
    """

    step: int
    best_val_loss: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    moments: Moments | None = None


@dataclass(frozen=True, eq=False)
class Model:
    """A model: its shape and its parameters on the host.

    Attributes:
        config: the shape.
        params: nested float32 NumPy arrays.
        training: where its training stands; None where nothing is known of it.
    """

    config: ModelConfig
    params: Tree = field(repr=False)
    training: Training | None = field(default=None, repr=False)
