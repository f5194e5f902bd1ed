"""Judging structures: validity, matches, and a pool of processes to do it in.

Names are loaded on first use, so that a process which only sends texts to a pool needs no pymatgen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crystallm_jax.lazy import lazy_names

if TYPE_CHECKING:
    from crystallm_jax.evaluation.bonds import bond_length_score, expected_bond_length, symmetry_orbits
    from crystallm_jax.evaluation.judging import judge
    from crystallm_jax.evaluation.matching import match
    from crystallm_jax.evaluation.parsing import parse_structure
    from crystallm_jax.evaluation.pool import ValidatorPool, validate_many
    from crystallm_jax.evaluation.validity import validate
    from crystallm_jax.evaluation.verdict import Judgement, ValidityReport

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
    "Judgement": "verdict",
    "ValidatorPool": "pool",
    "ValidityReport": "verdict",
    "bond_length_score": "bonds",
    "expected_bond_length": "bonds",
    "judge": "judging",
    "match": "matching",
    "parse_structure": "parsing",
    "symmetry_orbits": "bonds",
    "validate": "validity",
    "validate_many": "pool",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
