"""What a model is, and whether it is whole: what `crystallm info` shows of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.errors import CrystallmError
from crystallm_jax.models.card import ModelCard, damage_of
from crystallm_jax.models.detect import kind_of
from crystallm_jax.models.kinds import card_of, read_model
from crystallm_jax.models.model_folder import MOMENTS_FILE
from crystallm_jax.models.parameters import flattened


@dataclass(frozen=True)
class ModelDescription:
    """A model and its card.

    Attributes:
        path: of the file or folder.
        kind: as `models.detect` has it.
        config: the shape; empty where the model cannot be read.
        parameters: how many, the tied head counted once.
        step: optimiser steps taken; None where it is not known.
        best_val_loss: nats a token; None where it is not known.
        keeps_moments: whether a folder holds the optimiser's moments.
        license: as the card says; empty where it does not.
        data: likewise.
        training_command: likewise.
        metrics: likewise.
        text: of the card.
        files: by name, size and SHA-256 as the card says.
        checked: whether the hashes were compared.
        problems: what is wrong, a line each.
    """

    path: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0
    step: int | None = None
    best_val_loss: float | None = None
    keeps_moments: bool = False
    license: str = ""
    data: str = ""
    training_command: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checked: bool = False
    problems: tuple[str, ...] = ()


def describe_model(path: Path, *, verify: bool = True) -> ModelDescription:
    """Read a model and its card.

    Args:
        path: a file or folder that holds one.
        verify: whether to compare the hashes of all files that the card names; those of the parameters are compared
            whenever they are read.
    """
    problems: list[str] = []
    card = ModelCard()
    try:
        card = card_of(path)
        if verify:
            problems += [damage for name in card.files if (damage := damage_of(path, card, name))]
    except CrystallmError as error:
        problems.append(str(error))
    known: dict[str, Any] = {}
    try:
        weights = read_model(path)
        known["config"] = asdict(weights.config)
        known["parameters"] = int(sum(np.size(leaf) for leaf in flattened(weights.params).values()))
        if weights.training is not None:
            known |= {"step": weights.training.step, "best_val_loss": weights.training.best_val_loss}
        if card.parameters not in (0, known["parameters"]):
            problems.append(
                f"the card says {card.parameters:,} parameters, there are {known['parameters']:,}"
            )
    except CrystallmError as error:
        # A damaged file has been named already.
        if not problems:
            problems.append(str(error))
    return ModelDescription(
        path=str(path),
        kind=kind_of(path) or "none",
        keeps_moments=(path / MOMENTS_FILE).is_file(),
        license=card.license,
        data=card.data,
        training_command=card.training_command,
        metrics=dict(card.metrics),
        text=card.text,
        files={name: asdict(entry) for name, entry in card.files.items()},
        checked=verify and bool(card.files),
        problems=tuple(problems),
        **known,
    )
