"""Flags of `crystallm sample` that name prompts."""

import argparse
import re

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


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `crystallm_jax.cli.sample_prompts.prompts_from` reads."""
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
