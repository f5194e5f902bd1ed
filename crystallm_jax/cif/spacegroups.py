"""Space groups by symbol or number, and their operations in the setting of the corpus."""

import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from reprlib import repr as shorten
from types import MappingProxyType

from crystallm_jax.cif.vocabulary import SPACEGROUPS, SPACEGROUPS_WITHOUT_TOKEN
from crystallm_jax.errors import CIFError

# Symbols of the International Tables before 1992.
_OLD_SYMBOLS = {"Abm2": "Aem2", "Aba2": "Aea2", "Cmca": "Cmce", "Cmma": "Cmme", "Ccca": "Ccce"}
CRYSTAL_SYSTEMS: Mapping[str, int] = MappingProxyType(
    {
        "triclinic": 2,
        "monoclinic": 15,
        "orthorhombic": 74,
        "tetragonal": 142,
        "trigonal": 167,
        "hexagonal": 194,
        "cubic": 230,
    }
)
"""The last space group of each crystal system, by its number in the International Tables."""


def crystal_system(number: int) -> str:
    """The crystal system of a space group, 1 to 230."""
    return next(name for name, last in CRYSTAL_SYSTEMS.items() if number <= last)


@cache
def _symbols_by_number() -> Mapping[str, str]:
    known = {**SPACEGROUPS, **SPACEGROUPS_WITHOUT_TOKEN}
    return MappingProxyType({str(number): symbol for symbol, number in known.items()})


@cache
def _symbols_without_underscores() -> Mapping[str, str]:
    return MappingProxyType({symbol.replace("_", ""): symbol for symbol in _symbols_by_number().values()})


def find_spacegroup(spacegroup: str | int) -> str:
    """The vocabulary's symbol of a space group.

    Args:
        spacegroup: a symbol (`Fm-3m`; blanks, underscores and the five symbols that were renamed do not
            matter) or a number of the International Tables, 1 to 230, as a number or as digits.

    Raises:
        CIFError: no such space group, or one of the three (P6, P432, P4_222) that the vocabulary lacks.
    """
    symbol = _standard_symbol(spacegroup)
    if symbol in SPACEGROUPS_WITHOUT_TOKEN:
        raise CIFError(
            f"space group {symbol} (number {SPACEGROUPS_WITHOUT_TOKEN[symbol]}) has no token: "
            f"the vocabulary lacks {', '.join(SPACEGROUPS_WITHOUT_TOKEN)}, choose another or leave it out"
        )
    return symbol


def _standard_symbol(spacegroup: str | int) -> str:
    text = str(spacegroup)
    by_number = _symbols_by_number()
    if text.strip() in by_number:
        return by_number[text.strip()]
    if text.strip().lstrip("-").isdecimal():
        raise CIFError(f"space group number {shorten(spacegroup)} is outside 1 to {len(by_number)}")
    plain = "".join(text.split())
    plain = _OLD_SYMBOLS.get(plain, plain)
    without = _symbols_without_underscores()
    if plain.replace("_", "") in without:
        return without[plain.replace("_", "")]
    near = difflib.get_close_matches(plain, SPACEGROUPS, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "write a symbol such as Fm-3m or a number"
    raise CIFError(f"space group {shorten(text)} is unknown: {hint}")


@cache
def _operation_table() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Letter to coordinate, and symbol to the operations as words of three letters."""
    table = json.loads(Path(__file__).with_name("operations.json").read_text(encoding="utf-8"))
    return table["parts"], table["groups"]


@cache
def spacegroup_operations(symbol: str) -> tuple[str, ...]:
    """Operations of a space group such as `-x, y+1/2, -z`: the identity first, the others in lexical order.

    They are those that the published post-processing writes (pymatgen 2023.3.23), kept as a table.

    Raises:
        CIFError: the symbol is none of the 230 standard ones as the vocabulary writes them.
    """
    parts, groups = _operation_table()
    if symbol not in groups:
        raise CIFError(
            f"space group {shorten(symbol)} has no known operations: write one of the 230 standard symbols"
        )
    return tuple(", ".join(parts[letter] for letter in word) for word in groups[symbol].split())
