"""Judging structures: validity, matches, and a pool of processes to do it in.

Names are loaded on first use, so that a process which only sends texts to a pool needs no pymatgen.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crystallm_jax.evaluation.bonds import bond_length_score, expected_bond_length, symmetry_orbits
    from crystallm_jax.evaluation.judging import judge
    from crystallm_jax.evaluation.matching import match
    from crystallm_jax.evaluation.parsing import parse_structure
    from crystallm_jax.evaluation.pool import ValidatorPool, validate_many
    from crystallm_jax.evaluation.report import Judgement, ValidityReport
    from crystallm_jax.evaluation.validity import validate

__all__ = [
    "Judgement",
    "ValidatorPool",
    "ValidityReport",
    "bond_length_score",
    "expected_bond_length",
    "judge",
    "match",
    "parse_structure",
    "symmetry_orbits",
    "validate",
    "validate_many",
]

_MODULES = {
    "Judgement": "report",
    "ValidatorPool": "pool",
    "ValidityReport": "report",
    "bond_length_score": "bonds",
    "expected_bond_length": "bonds",
    "judge": "judging",
    "match": "matching",
    "parse_structure": "parsing",
    "symmetry_orbits": "bonds",
    "validate": "validity",
    "validate_many": "pool",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
