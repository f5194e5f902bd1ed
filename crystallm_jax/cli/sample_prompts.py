"""The prompts that the flags of `crystallm sample` name."""

import argparse
import logging
from collections.abc import Callable, Sequence

from crystallm_jax.cif.formula import cell_formula
from crystallm_jax.cli.flags.prompts import DEFAULT_FIT_SITES, DEFAULT_MAX_FORMULA_ATOMS, FIT
from crystallm_jax.errors import ConfigError, SamplingError
from crystallm_jax.sampling import prompts as sources
from crystallm_jax.sampling.cells import fitting_prompts
from crystallm_jax.sampling.chemistry import balanced_formulas
from crystallm_jax.sampling.prompt_files import DEFAULT_UNITS, read_prompts
from crystallm_jax.sampling.prompts import Prompt, formula_prompts

# Flags that say more about others: themselves, what they go with, and why not with the rest.
_GO_WITH = (
    ("z", ("formula", "elements"), "a composition counts the whole cell, and in a file z stands beside each"),
    ("spacegroup", ("composition", "formula", "elements"), "in a file it stands beside each"),
    ("with_spacegroup", ("prompts",), "it asks for the records of a prepared folder with theirs"),
    ("subsystems", ("elements",), "it adds the systems of some of the elements"),
    ("max_formula_atoms", ("elements",), "it bounds the formulas that are enumerated"),
)

_log = logging.getLogger(__name__)


def prompts_from(
    arguments: argparse.Namespace, *, block_size: Callable[[], int] | None = None
) -> list[Prompt]:
    """The prompts that the flags name.

    What is left out is counted in a message.

    Args:
        arguments: with the flags of `add_prompt_flags`, and `model`.
        block_size: gives the context of the model, and is called for `--z fit` alone; None reads the model's weights.

    Raises:
        ConfigError: flags that do not go together.
        CIFError: a composition, element or space group that the vocabulary cannot express.
        SamplingError: a condition that cannot be honoured, or none left.
    """
    _check(arguments)
    sources.excluded_ids(arguments.exclude_elements)
    prompts = _named(arguments, block_size or (lambda: _block_size(arguments.model)))
    if arguments.elements or arguments.z == FIT or arguments.spacegroup == sources.COMPATIBLE:
        _log.info("%s prompts", f"{len(prompts):,}")
    if arguments.exclude_elements:
        kept = sources.without_elements(prompts, arguments.exclude_elements)
        _tell(len(prompts) - len(kept), f"with excluded elements ({','.join(arguments.exclude_elements)})")
        prompts = kept
    if arguments.max_sites is not None:
        kept = sources.within_sites(prompts, arguments.max_sites)
        _tell(len(prompts) - len(kept), f"of more than {arguments.max_sites} sites")
        prompts = kept
    prompts = prompts[: arguments.limit]
    if arguments.spacegroup not in (None, sources.COMPATIBLE):
        hopeless = sources.unfitting(prompts)
        if hopeless:
            _log.warning(
                "%s of %s prompts name a space group that cannot hold the cell, such as %s:"
                " --spacegroup compatible names those that can",
                f"{len(hopeless):,}",
                f"{len(prompts):,}",
                hopeless[0].id,
            )
    return prompts


def _tell(count: int, which: str, *, kind: str = "prompts") -> None:
    if count:
        _log.info("left out %s %s %s", f"{count:,}", kind, which)


def _check(arguments: argparse.Namespace) -> None:
    for name, others, reason in _GO_WITH:
        given = getattr(arguments, name)
        if given is None or given is False:
            continue
        if not any(getattr(arguments, other) is not None for other in others):
            flags = " or ".join(_flag(other) for other in others)
            raise ConfigError(f"{_flag(name)} goes with {flags}: {reason}")
    if arguments.unconditional and arguments.max_sites is not None:
        raise ConfigError(
            "--max-sites cannot be honoured with --unconditional, where the model chooses the cell: name compositions"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _named(arguments: argparse.Namespace, block_size: Callable[[], int]) -> list[Prompt]:
    if arguments.unconditional:
        return [sources.unconditional_prompt()]
    if arguments.composition is not None:
        return sources.composition_prompts(arguments.composition, arguments.spacegroup)
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts, with_spacegroup=arguments.with_spacegroup)
    if arguments.formula is not None:
        return _formulas_prompts([arguments.formula], arguments, block_size)
    return _system_prompts(arguments, block_size)


def _formulas_prompts(
    formulas: Sequence[str], arguments: argparse.Namespace, block_size: Callable[[], int]
) -> list[Prompt]:
    """The prompts of formulas at each number of formula units.

    Raises:
        SamplingError: no cell of any fits the context.
    """
    group = arguments.spacegroup
    if arguments.z != FIT:
        units = arguments.z or DEFAULT_UNITS
        return [prompt for formula in formulas for prompt in formula_prompts(formula, units, group)]
    context, most_sites = block_size(), arguments.max_sites or DEFAULT_FIT_SITES
    found = [fitting_prompts(f, group, block_size=context, most_sites=most_sites) for f in formulas]
    prompts = [prompt for some in found for prompt in some]
    if not prompts:
        what = formulas[0] if len(formulas) == 1 else f"any of the {len(formulas):,} formulas"
        within = f" in space group {group}" if group else ""
        raise SamplingError(
            f"--z {FIT}: no cell of {what}{within} with at most {most_sites} atoms has a text that can fit the context"
            f" of {context} tokens: raise --max-sites, or name the numbers"
        )
    _tell(sum(not some for some in found), "no cell of which fits", kind="formulas")
    return prompts


def _system_prompts(arguments: argparse.Namespace, block_size: Callable[[], int]) -> list[Prompt]:
    most = arguments.max_formula_atoms or DEFAULT_MAX_FORMULA_ATOMS
    fewest = 2 if arguments.subsystems else None
    formulas = [
        cell_formula(counts) for counts in balanced_formulas(arguments.elements, most, fewest_elements=fewest)
    ]
    system = "-".join(arguments.elements)
    _log.info("%s: %s charge-balanced formulas of up to %d atoms", system, f"{len(formulas):,}", most)
    return _formulas_prompts(formulas, arguments, block_size)


def _block_size(model: str) -> int:
    from crystallm_jax.models.kinds import read_model  # noqa: PLC0415 - JAX

    return read_model(model).config.block_size
