"""Prompts and their names, from compositions and formulas; and which of them are left out."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crystallm_jax.cif import SPACEGROUPS, UNCONDITIONAL_PROMPT, find_spacegroup, make_prompt
from crystallm_jax.cif.formula import cell_formula, check_element, parse_formula
from crystallm_jax.cif.occupations import compatible_spacegroups, fits
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG, TOKENS
from crystallm_jax.errors import SamplingError

COMPATIBLE = "compatible"
"""Stands for all space groups whose Wyckoff positions can hold a composition."""

# File systems take 255 bytes; the number of the sample and an ending follow.
_LONGEST_NAME = 200
_COMPOSITION = re.compile(r"data_([^\n]*)(\n?)")

# The space group that a prompt states.
_STATED_GROUP = re.compile(rf"{SPACEGROUP_TAG} +(\S+)")


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        id: the name that its samples' files begin with.
        text: that the model completes.
        n: how many samples of it; None leaves it to the request.
    """

    id: str
    text: str
    n: int | None = None


def unconditional_prompt() -> Prompt:
    """Leaves even the composition to the model."""
    return Prompt("unconditional", UNCONDITIONAL_PROMPT)


def composition_prompt(composition: str, spacegroup: str | None = None) -> Prompt:
    """A prompt for the whole cell's composition.

    Raises:
        CIFError: a composition or space group that the vocabulary cannot express.
    """
    text = make_prompt(composition, spacegroup)
    name = cell_formula(parse_formula(composition))
    return Prompt(name if spacegroup is None else f"{name}_{spacegroup}", text)


def composition_prompts(composition: str, spacegroup: str | None = None) -> list[Prompt]:
    """A prompt for the whole cell's composition in each of the space groups.

    Args:
        composition: of the cell.
        spacegroup: a symbol or number, several separated by commas, or `compatible`.

    Raises:
        CIFError: a composition or space group that the vocabulary cannot express.
        SamplingError: a space group named twice.
    """
    groups = wanted_spacegroups(parse_formula(composition), spacegroup)
    return [composition_prompt(composition, group) for group in groups]


def formula_prompts(formula: str, z: Sequence[int], spacegroup: str | None = None) -> list[Prompt]:
    """A prompt for each number of formula units in the cell, in each of the space groups.

    Args:
        formula: a formula unit.
        z: numbers of them in a cell.
        spacegroup: a symbol or number, several separated by commas, or `compatible`.

    Raises:
        CIFError: a formula or space group that the vocabulary cannot express.
        SamplingError: a number below 1, a number or space group named twice.
    """
    if not z or min(z) < 1:
        raise SamplingError(f"z={','.join(map(str, z))}: numbers of formula units start at 1")
    if len(set(z)) < len(z):
        raise SamplingError(f"z={','.join(map(str, z))}: one of them stands there twice")
    counts = parse_formula(formula)
    return [
        prompt
        for units in z
        for prompt in composition_prompts(cell_formula(cell_counts(counts, units)), spacegroup)
    ]


def cell_counts(counts: Mapping[str, int], units: int) -> dict[str, int]:
    """The counts of a cell of so many formula units."""
    return {symbol: units * count for symbol, count in counts.items()}


def wanted_spacegroups(counts: Mapping[str, int], spacegroup: str | None) -> list[str | None]:
    """The space groups to ask for; None, which leaves it to the model, where none is named.

    Args:
        counts: of the cell.
        spacegroup: a symbol or number, several separated by commas, or `compatible`.

    Raises:
        CIFError: one that the vocabulary cannot express.
        SamplingError: one named twice.
    """
    if spacegroup is None:
        return [None]
    if spacegroup.strip() == COMPATIBLE:
        return [symbol for symbol in compatible_spacegroups(counts) if symbol in SPACEGROUPS]
    given = [part.strip() for part in spacegroup.split(",")]
    if len({find_spacegroup(part) for part in given}) < len(given):
        raise SamplingError(f"space groups {spacegroup}: one of them stands there twice")
    return list(given)


def unique_ids(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts with names that are unlike each other and fit a file name on every system."""
    seen: set[str] = set()
    renamed = []
    for prompt in prompts:
        base = re.sub(r"[^A-Za-z0-9._+-]", "-", prompt.id)[:_LONGEST_NAME].strip(".") or "prompt"
        name, number = base, 1
        while name.lower() in seen:
            number += 1
            name = f"{base}-{number}"
        seen.add(name.lower())
        renamed.append(prompt._replace(id=name))
    return renamed


def prompt_counts(prompt: Prompt) -> dict[str, int] | None:
    """The counts of the cell that a prompt asks for; None where the model is to write or go on with them.

    Raises:
        CIFError: what stands behind `data_` is no composition.
    """
    match = _COMPOSITION.match(prompt.text)
    return parse_formula(match[1]) if match and match[2] else None


def prompt_elements(prompt: Prompt) -> frozenset[str]:
    """The elements that a prompt names.

    Raises:
        CIFError: what stands behind `data_` is no composition.
    """
    match = _COMPOSITION.match(prompt.text)
    return frozenset(parse_formula(match[1]) if match and match[1] else ())


def without_elements(prompts: Sequence[Prompt], symbols: Sequence[str]) -> list[Prompt]:
    """The prompts that ask for none of these elements.

    Raises:
        SamplingError: none is left.
    """
    kept = [prompt for prompt in prompts if not prompt_elements(prompt).intersection(symbols)]
    if prompts and not kept:
        raise SamplingError(
            f"excluded elements {','.join(symbols)}: each of the {len(prompts):,} prompts has one of them"
        )
    return kept


def within_sites(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """The prompts whose cells hold at most so many atoms.

    Raises:
        SamplingError: none is left, or one that leaves the composition to the model.
    """
    kept, least = [], None
    for prompt in prompts:
        counts = prompt_counts(prompt)
        if counts is None:
            raise SamplingError(
                f"at most {most} sites: cannot be honoured for the prompt {prompt.id!r}, which leaves the"
                " composition to the model; state one"
            )
        atoms = sum(counts.values())
        least = atoms if least is None else min(least, atoms)
        if atoms <= most:
            kept.append(prompt)
    if prompts and not kept:
        raise SamplingError(f"at most {most} sites: the smallest cell asked for has {least} atoms")
    return kept


def excluded_ids(symbols: Sequence[str]) -> tuple[int, ...]:
    """The tokens of elements, which are never to be drawn.

    Raises:
        CIFError: an element that the vocabulary lacks.
    """
    for symbol in symbols:
        check_element(symbol)
    return tuple(TOKENS.index(symbol) for symbol in symbols)


def unfitting(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those whose space group has no positions that hold the composition: whatever a model writes will be wrong."""
    found = []
    for prompt in prompts:
        counts, stated = prompt_counts(prompt), _STATED_GROUP.search(prompt.text)
        if counts and stated is not None and not fits(counts, stated[1]):
            found.append(prompt)
    return found
