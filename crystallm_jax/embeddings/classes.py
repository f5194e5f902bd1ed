"""What is known of the tokens besides their vectors: blocks and groups of elements, systems of space groups."""

from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from crystallm_jax.cif import ELEMENTS, SPACEGROUPS
from crystallm_jax.cif.spacegroups import crystal_system
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX
from crystallm_jax.embeddings.vectors import DrawnKind

_NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
_F_BLOCK = 14
_SERIES = {6: "lanthanides", 7: "actinides"}
# By atomic number from 1 to 94.
# fmt: off
_NAMES = (
    "hydrogen", "helium", "lithium", "beryllium", "boron", "carbon", "nitrogen", "oxygen", "fluorine",
    "neon", "sodium", "magnesium", "aluminium", "silicon", "phosphorus", "sulfur", "chlorine", "argon",
    "potassium", "calcium", "scandium", "titanium", "vanadium", "chromium", "manganese", "iron", "cobalt",
    "nickel", "copper", "zinc", "gallium", "germanium", "arsenic", "selenium", "bromine", "krypton",
    "rubidium", "strontium", "yttrium", "zirconium", "niobium", "molybdenum", "technetium", "ruthenium",
    "rhodium", "palladium", "silver", "cadmium", "indium", "tin", "antimony", "tellurium", "iodine",
    "xenon", "caesium", "barium", "lanthanum", "cerium", "praseodymium", "neodymium", "promethium",
    "samarium", "europium", "gadolinium", "terbium", "dysprosium", "holmium", "erbium", "thulium",
    "ytterbium", "lutetium", "hafnium", "tantalum", "tungsten", "rhenium", "osmium", "iridium", "platinum",
    "gold", "mercury", "thallium", "lead", "bismuth", "polonium", "astatine", "radon", "francium", "radium",
    "actinium", "thorium", "protactinium", "uranium", "neptunium", "plutonium",
)
# fmt: on

# Hues that the colour-blind tell apart, too.
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "s block": "#ee6677",
        "p block": "#4477aa",
        "d block": "#228833",
        "f block": "#ccaa33",
        "triclinic": "#888888",
        "monoclinic": "#ee6677",
        "orthorhombic": "#ddaa33",
        "tetragonal": "#228833",
        "trigonal": "#33aadd",
        "hexagonal": "#3355aa",
        "cubic": "#aa3377",
        "digits": "#4477aa",
    }
)
"""Of every class that is drawn, in the order of the legend."""
TITLES: Mapping[DrawnKind, str] = MappingProxyType(
    {"atom": "elements", "digit": "digits", "spacegroup": "space groups"}
)
"""What the tokens of a kind are called."""


class Place(NamedTuple):
    """Where an element stands in the periodic table; the f block has no groups."""

    period: int
    block: str
    group: int | None


class TokenFacts(NamedTuple):
    """What a picture says of a token.

    Attributes:
        label: written at its point, without `_sg`.
        class_name: which its colour tells, one of `COLOURS`.
        family: a finer class: groups of elements; the same as the class where there is none.
        facts: names and values.
    """

    label: str
    class_name: str
    family: str
    facts: tuple[tuple[str, str], ...]


def periodic_place(number: int) -> Place:
    """Period, block and group of an element; lanthanum to ytterbium and actinium to nobelium are the f block."""
    period = bisect_left(_NOBLE_GASES, number)
    offset, length = number - _NOBLE_GASES[period - 1], _NOBLE_GASES[period] - _NOBLE_GASES[period - 1]
    if number == 2:
        return Place(period, "s", 18)
    if offset <= 2:
        return Place(period, "s", offset)
    before_end = length - offset
    if before_end < 6:
        return Place(period, "p", 18 - before_end)
    if before_end < 16:
        return Place(period, "d", 18 - before_end)
    return Place(period, "f", None)


def facts_of(token: str, kind: DrawnKind) -> TokenFacts:
    """What is known of a token of a kind that is drawn."""
    if kind == "atom":
        number = ELEMENTS[token].number
        period, block, group = periodic_place(number)
        family = f"group {group}" if group else _SERIES[period]
        return TokenFacts(
            token,
            f"{block} block",
            family,
            (
                ("name", _NAMES[number - 1]),
                ("atomic number", str(number)),
                ("block", block),
                ("period", str(period)),
                ("group", str(group) if group else family),
            ),
        )
    if kind == "spacegroup":
        symbol = token.removesuffix(SPACEGROUP_SUFFIX)
        system = crystal_system(SPACEGROUPS[symbol])
        return TokenFacts(
            symbol, system, system, (("number", str(SPACEGROUPS[symbol])), ("crystal system", system))
        )
    return TokenFacts(token, "digits", "digits", ())
