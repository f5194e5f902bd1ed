"""Beginnings of texts that a model completes."""

import re

from crystallm_jax.cif.formula import cell_formula, parse_formula
from crystallm_jax.cif.preprocess import property_block
from crystallm_jax.cif.spacegroups import find_spacegroup
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG
from crystallm_jax.errors import CIFError

UNCONDITIONAL_PROMPT = "data_"
"""Leaves even the composition to the model."""

_TO_COMPOSITION = re.compile(r"data_[^\n]*\n")
_TO_SPACEGROUP = re.compile(rf"data_[^\n]*\nloop_[\s\S]*?{SPACEGROUP_TAG}[^\n]*\n")


def make_prompt(composition: str, spacegroup: str | int | None = None) -> str:
    """The text that a crystal of this composition begins with.

    Args:
        composition: counts of the whole conventional cell, in any order: `Na4Cl4`.
        spacegroup: a symbol or a number of the International Tables; the prompt then holds the property block
            too.

    Raises:
        CIFError: a composition or space group that the vocabulary cannot express.
    """
    counts = parse_formula(composition)
    prompt = f"data_{cell_formula(counts)}\n"
    if spacegroup is None:
        return prompt
    block = "\n".join(line.strip() for line in property_block(counts).splitlines())
    return f"{prompt}{block}\n{SPACEGROUP_TAG}   {find_spacegroup(spacegroup)}\n"


def prompt_from_cif(preprocessed: str, with_spacegroup: bool = False) -> str:
    """The prompt that a preprocessed text begins with, its lines stripped.

    Raises:
        CIFError: the text has no such beginning.
    """
    pattern, searched = _TO_COMPOSITION, preprocessed
    if with_spacegroup:
        # Behind the last tag's line there is no such beginning, and looking for one takes quadratic time.
        before, tag, after = preprocessed.rpartition(SPACEGROUP_TAG)
        pattern, searched = _TO_SPACEGROUP, before + tag + after.split("\n", 1)[0] + "\n" if tag else ""
    match = pattern.search(searched)
    if match is None:
        wanted = f"property block and {SPACEGROUP_TAG} line" if with_spacegroup else "data_ line"
        raise CIFError(f"the text has no {wanted}: preprocess it with preprocess_cif")
    return "\n".join(line.strip() for line in match[0].splitlines()) + "\n"
