"""Whether a generated structure is the true one, and how far apart the two are."""

from __future__ import annotations

import warnings

import numpy as np
from pymatgen.core import Structure

from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation.parsing import parse_structure
from crystallm_jax.evaluation.validity import ANGLES, LENGTHS, is_sensible, ordinary_text

try:
    from pymatgen.core.structure_matcher import StructureMatcher
except ImportError:  # before 2026
    from pymatgen.analysis.structure_matcher import StructureMatcher


def match(
    generated: Structure | str,
    true: Structure | str,
    *,
    ltol: float = 0.3,
    stol: float = 0.5,
    angle_tol: float = 10.0,
) -> float | None:
    """The RMS distance of two structures as StructureMatcher gives it, or None if they do not match.

    The defaults are those of the published benchmarks. The distance is divided by (volume / sites)^(1/3)
    and has no unit.

    Args:
        generated: A structure or a CIF text, raw or post-processed. One that does not parse, or whose
            cell is not sensible (lengths 0.5 to 1000 Å, angles 10 to 170 degrees), matches nothing.
        true: A structure or a CIF text.
        ltol: Fractional tolerance of lengths.
        stol: Tolerance of sites, as a fraction of (volume / sites)^(1/3).
        angle_tol: Tolerance of angles in degrees.

    Raises:
        CIFError: The true text does not parse.
    """
    truth = parse_structure(ordinary_text(true)) if isinstance(true, str) else true
    if isinstance(generated, str):
        try:
            text = ordinary_text(generated)
            candidate = parse_structure(text) if is_sensible(text) else None
        except CIFError:
            return None
    else:
        candidate = generated if _has_sensible_cell(generated) else None
    if candidate is None:
        return None
    matcher = StructureMatcher(ltol=ltol, stol=stol, angle_tol=angle_tol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = matcher.get_rms_dist(candidate, truth)
        except (ArithmeticError, IndexError, TypeError, ValueError):
            return None  # cells without a reduced form: the published benchmark counts them as no match
    return None if found is None else float(found[0])


def _has_sensible_cell(structure: Structure) -> bool:
    lengths, angles = np.array(structure.lattice.abc), np.array(structure.lattice.angles)
    return bool(
        ((lengths >= LENGTHS[0]) & (lengths <= LENGTHS[1])).all()
        and ((angles >= ANGLES[0]) & (angles <= ANGLES[1])).all()
    )
