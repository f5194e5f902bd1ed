"""What `crystallm sample` is asked for: the flags that name prompts, and the prompts that they name."""

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crystallm_jax.sampling.prompts import Prompt

FIT = "fit"
DEFAULT_MAX_FORMULA_ATOMS = 12
# What a search over the numbers of formula units stops at where --max-sites does not say.
DEFAULT_FIT_SITES = 100

PROMPT_HELP = """A composition counts the atoms of the whole cell; --formula is a formula unit. --prompts reads
  a CSV         with a column `composition`, or `formula` and `z`, and, if wanted, `spacegroup`, `n` (samples), `id`;
  a text file   with a composition and, if wanted, a space group a line;
  a folder      that `prepare` made, whose test records are asked for;
  an archive    of prompts as texts ID.txt (.tar.gz), as published, a folder of them, or one of them.
--elements asks for the formulas of all these elements whose common oxidation states balance, smallest first.
"""

# Flags that say more about others: themselves, what they go with, and why not with the rest.
_GO_WITH = (
    ("z", ("formula", "elements"), "a composition counts the whole cell, and in a file z stands beside each"),
    ("spacegroup", ("composition", "formula", "elements"), "in a file it stands beside each"),
    ("with_spacegroup", ("prompts",), "it asks for the records of a prepared folder with theirs"),
    ("subsystems", ("elements",), "it adds the systems of some of the elements"),
    ("max_formula_atoms", ("elements",), "it bounds the formulas that are enumerated"),
)

_log = logging.getLogger(__name__)


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `prompts_from` reads."""
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--composition", metavar="C", help="of the whole cell: Na4Cl4")
    sources.add_argument("--formula", metavar="F", help="a formula unit, NaCl; --z says how many fill a cell")
    sources.add_argument("--elements", metavar="E", type=_elements, help="a chemical system: Li-Fe-P-O")
    sources.add_argument("--prompts", metavar="FILE", help="many prompts, see below")
    sources.add_argument(
        "--unconditional", action="store_true", help="leave even the composition to the model"
    )
    add = parser.add_argument
    add(
        "--z",
        type=_units,
        metavar="Z",
        help="formula units a cell: numbers, or `fit` for all whose text can fit the context (default: 1,2,3,4)",
    )
    add(
        "--spacegroup",
        type=_spacegroups,
        metavar="S",
        help="a symbol (Fm-3m) or a number (225), several separated by commas, or `compatible` for all whose"
        " Wyckoff positions can hold the cell",
    )
    add("--with-spacegroup", action="store_true", help="prompt the records of a prepared folder with theirs")
    add("--subsystems", action="store_true", help="with --elements: formulas of some of the elements too")
    add(
        "--max-formula-atoms",
        type=positive,
        metavar="N",
        help=f"with --elements: atoms of a formula unit (default: {DEFAULT_MAX_FORMULA_ATOMS})",
    )
    add(
        "--exclude-elements",
        type=_symbols,
        default=(),
        metavar="E",
        help="leave out prompts with one of these (Pb,Cd), and never draw their tokens",
    )
    add(
        "--max-sites",
        type=positive,
        metavar="N",
        help=f"leave out cells of more atoms (default: no limit; --z fit: {DEFAULT_FIT_SITES})",
    )
    add("--limit", type=positive, metavar="N", help="only the first N prompts")


def prompts_from(
    arguments: argparse.Namespace, *, block_size: Callable[[], int] | None = None
) -> "list[Prompt]":
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
    from crystallm_jax.sampling import prompts as sources  # noqa: PLC0415 - keeps --help instant

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
    from crystallm_jax.errors import ConfigError  # noqa: PLC0415

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


def _named(arguments: argparse.Namespace, block_size: Callable[[], int]) -> "list[Prompt]":
    from crystallm_jax.sampling import prompts as sources  # noqa: PLC0415
    from crystallm_jax.sampling.prompt_files import read_prompts  # noqa: PLC0415

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
) -> "list[Prompt]":
    """The prompts of formulas at each number of formula units.

    Raises:
        SamplingError: no cell of any fits the context.
    """
    from crystallm_jax.errors import SamplingError  # noqa: PLC0415
    from crystallm_jax.sampling.cells import fitting_prompts  # noqa: PLC0415
    from crystallm_jax.sampling.prompt_files import DEFAULT_UNITS  # noqa: PLC0415
    from crystallm_jax.sampling.prompts import formula_prompts  # noqa: PLC0415

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


def _system_prompts(arguments: argparse.Namespace, block_size: Callable[[], int]) -> "list[Prompt]":
    from crystallm_jax.cif.formula import cell_formula  # noqa: PLC0415
    from crystallm_jax.sampling.chemistry import balanced_formulas  # noqa: PLC0415

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


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def _units(text: str) -> tuple[int, ...] | str:
    if text == FIT:
        return FIT
    try:
        return tuple(positive(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected whole numbers from 1 on such as 1,2,4, or {FIT}"
        ) from None


def _spacegroups(text: str) -> str:
    if not all(part.strip() for part in text.split(",")):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected symbols or numbers separated by commas, or `compatible`"
        )
    return text


def _symbols(text: str) -> tuple[str, ...]:
    return _split(text, ",", "Pb,Cd")


def _elements(text: str) -> tuple[str, ...]:
    return _split(text, "-", "Li-Fe-P-O")


def _split(text: str, separator: str, example: str) -> tuple[str, ...]:
    symbols = tuple(part.strip() for part in text.split(separator))
    if not all(re.fullmatch(r"[A-Z][a-z]?", symbol) for symbol in symbols):
        raise argparse.ArgumentTypeError(f"{text!r}: expected symbols of elements such as {example}")
    return symbols
