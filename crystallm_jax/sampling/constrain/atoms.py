"""What atoms take: least distances of pairs of elements and volumes, as `tools/make_atoms.py` learnt them."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crystallm_jax.sampling.constrain.nodes import TOKEN_ID

LEAST_HEIGHT = 1.5
"""Å between opposite faces of a cell: of 106,490 crystals 3 have less."""


class AtomTables(NamedTuple):
    """By the tokens of elements.

    Attributes:
        distances: float32 [E, E]; least distances of two atoms, Å.
        volumes: float32 [E]; of an atom, Å^3.
        shares: the least and the greatest share of the sum of its atoms' volumes that a cell may have.
    """

    distances: np.ndarray
    volumes: np.ndarray
    shares: tuple[float, float]


@cache
def atom_tables() -> AtomTables:
    """The tables, read once."""
    table = json.loads(Path(__file__).with_name("atoms.json").read_text(encoding="utf-8"))
    size = len(table["atoms"])
    tokens = [TOKEN_ID[symbol] for symbol, *_ in table["atoms"]]
    distances, volumes = np.zeros((size, size), np.float32), np.zeros(size, np.float32)
    for token, (_, volume, *row) in zip(tokens, table["atoms"], strict=True):
        volumes[token] = volume
        distances[token, tokens[: len(row)]] = distances[tokens[: len(row)], token] = row
    return AtomTables(distances, volumes, tuple(table["volume_shares"]))
