"""All that becomes of a text that a model wrote, from one parse: verdicts, a frame, the symmetrised crystal."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from pymatgen.core import DummySpecies, Structure

from crystallm_jax.cif import symmetrized_cif
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation.parsing import describe
from crystallm_jax.evaluation.validity import SYMPREC, examine
from crystallm_jax.evaluation.verdict import Judgement, one_line

# Verdicts after which looking at the structure again would be slow or futile.
_NO_STRUCTURE = {"unparsable", "too_large", "timeout", "memory", "crashed"}


def judge(cif: str, *, time_limit: float = 60.0) -> Judgement:
    """Judges a CIF text, and writes its structure as an extxyz frame and as a symmetrised CIF.

    Args:
        cif: A post-processed text, or the raw output of a model.
        time_limit: Seconds, as for `validate`.
    """
    report, structure = examine(cif, time_limit=time_limit)
    if structure is None or _NO_STRUCTURE & set(report.reasons):
        return Judgement(report)
    omitted: list[str] = []
    frame = _attempt("no frame", lambda: frame_text(structure), omitted)
    symmetrized = _attempt("not symmetrised", lambda: symmetrized_cif(structure, SYMPREC), omitted)
    return Judgement(report, frame, symmetrized, one_line("; ".join(omitted)) if omitted else None)


def frame_text(structure: Structure) -> str:
    """A structure as a frame of an extxyz file: the number of sites, a comment with the cell in ångström, the sites.

    Raises:
        CIFError: Partly occupied sites or unknown elements, which the format does not know.
    """
    if not structure.is_ordered:
        raise CIFError("a site is partly occupied")
    kinds = [site.specie for site in structure]
    if any(isinstance(kind, DummySpecies) for kind in kinds):
        raise CIFError("a site holds no element")
    cell = " ".join(f"{value:.8f}" for value in structure.lattice.matrix.ravel())
    rows = (
        f"{getattr(kind, 'element', kind).symbol:<2} {x:16.8f} {y:16.8f} {z:16.8f}"
        for kind, (x, y, z) in zip(kinds, structure.cart_coords, strict=True)
    )
    comment = f'Lattice="{cell}" Properties=species:S:1:pos:R:3 pbc="T T T"'
    return "\n".join([str(len(structure)), comment, *rows, ""])


def _attempt(what: str, compute: Callable[[], str], omitted: list[str]) -> str | None:
    """The text, or None and why: on a structure from a model any library call may raise anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return compute()
        except Exception as error:  # noqa: BLE001 - kept: what it says goes into the judgement
            omitted.append(f"{what}: {error if isinstance(error, CIFError) else describe(error)}")
            return None
