"""The 89 elements of the vocabulary and the properties that texts and bond scores use.

The numbers are the published model's (pymatgen 2023.3.23), kept in `elements.json`: newer tables differ (the
ionic radius of Mn), and a text must not change with the library installed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Element:
    """An element with a token. Radii in ångström; None where the table has no value.

    The three `printed` fields are the columns of the element's line in the property block, as text: noble
    gases without an electronegativity or radius have another source and other decimals there.
    """

    symbol: str
    number: int
    printed_electronegativity: str
    printed_atomic_radius: str
    printed_ionic_radius: str
    electronegativity: float | None
    atomic_radius: float | None
    average_ionic_radius: float
    average_cationic_radius: float
    average_anionic_radius: float

    @property
    def property_sort_key(self) -> tuple[float, str]:
        """Key of the property block's order: electronegativity (none: last), then the symbol."""
        return (math.inf if self.electronegativity is None else self.electronegativity, self.symbol)


def _read_table() -> Mapping[str, Element]:
    table = json.loads(Path(__file__).with_name("elements.json").read_text(encoding="utf-8"))
    elements = (Element(**dict(zip(table["columns"], row, strict=True))) for row in table["rows"])
    return MappingProxyType({element.symbol: element for element in elements})


ELEMENTS: Mapping[str, Element] = _read_table()
"""Symbol to element, in the order of the vocabulary."""

# The elements without a token, so that one of them is told from a slip of the pen.
# fmt: off
ELEMENTS_WITHOUT_TOKEN: frozenset[str] = frozenset({
    "Po", "At", "Rn", "Fr", "Ra", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No", "Lr", "Rf",
    "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og",
})
# fmt: on
