"""Prototypes and the ions that may stand in them: the chemistry of `make_corpus.py`, without geometry."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.analysis.structure_prediction.substitution_probability import SubstitutionProbability
from pymatgen.core import Element, Species, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from crystallm_jax.cif import ELEMENTS

SYMPREC = 0.1
# About 250 tokens come before the sites and a site takes 30, so that more orbits never fit.
MAX_ORBITS = 14
# Below this product of conditional probabilities a decoration is not tried.
PROBABILITY_FLOOR = 1e-6
# So many of the likeliest candidates of a prototype are put in order.
POOL = 2000
# How much each earlier use of an ion in the prototype counts against the next, in nats.
REPEAT_PENALTY = 0.5
# The table of substitutions has no such ions (P3-, Te2-, H-, …): within a family they stand for one another.
FAMILIES = (
    ("N3-", "P3-", "As3-", "Sb3-", "Bi3-"),
    ("S2-", "Se2-", "Te2-"),
    ("H-", "F-"),
    ("C4-", "Si4-", "Ge4-"),
)
FAMILY_PROBABILITY = 0.1
SELF_PROBABILITY = 0.5


@dataclass(frozen=True)
class Prototype:
    """A prototype's primitive cell, its orbits (site indices) and the ion on each of them."""

    label: str
    structure: Structure
    orbits: tuple[tuple[int, ...], ...]
    ions: tuple[Species, ...]


class Decoration(NamedTuple):
    """A way to see a prototype: classes of orbits that take the same ion, and the ion that they hold now."""

    classes: tuple[tuple[int, ...], ...]
    ions: tuple[Species, ...]
    sizes: tuple[int, ...]


class Candidate(NamedTuple):
    """Ions for the classes of a decoration and the logarithm of the product of their probabilities."""

    log_probability: float
    decoration: Decoration
    ions: tuple[Species, ...]


class Substitutions:
    """The probabilities of replacing one ion by another, by ion, each a list sorted from the likeliest."""

    def __init__(self) -> None:
        self._table = SubstitutionProbability()
        self._families = {Species.from_str(ion): family for family in FAMILIES for ion in family}
        known = self._table.species | set(self._families)
        self._ions = sorted((ion for ion in known if _usual(ion)), key=str)
        self._ranked: dict[Species, list[tuple[float, Species]]] = {}

    def of(self, ion: Species) -> list[tuple[float, Species]]:
        """The ions of the same sign that may stand for `ion` and their log-probabilities, likeliest first.

        Rounded, because the table sums its norms in an order that changes from run to run.
        """
        if ion not in self._ranked:
            found = []
            for other in self._ions:
                probability = self._probability(other, ion)
                if probability > 0 and other.oxi_state * ion.oxi_state > 0:
                    found.append((round(math.log(probability), 6), other))
            self._ranked[ion] = sorted(found, key=lambda pair: (-pair[0], str(pair[1])))
        return self._ranked[ion]

    def _probability(self, new: Species, old: Species) -> float:
        if new in self._table.species and old in self._table.species:
            return self._table.cond_prob(new, old)
        if new == old:
            return SELF_PROBABILITY
        same = new in self._families and self._families[new] == self._families.get(old)
        return FAMILY_PROBABILITY if same else 0.0


def _usual(ion: Species) -> bool:
    """Whether the ICSD has the ion and the vocabulary its element.

    Cations that occur in molecules only (of halogens, noble gases, N, O, and C2+) are left out.
    """
    element = Element(ion.symbol)
    if element.symbol not in ELEMENTS or ion.oxi_state not in element.icsd_oxidation_states:
        return False
    if element.symbol == "C" and ion.oxi_state in {2, 3}:
        return False
    nonmetal = element.is_halogen or element.is_noble_gas or element.symbol in {"N", "O"}
    return ion.oxi_state < 0 or not nonmetal


def load_prototypes(names: Iterable[str] = ()) -> tuple[list[Prototype], Counter[str]]:
    """The usable prototypes, sorted by label.

    Args:
        names: AFLOW labels to keep; all where empty.

    Returns:
        The prototypes, and how many were left out by reason.
    """
    wanted, found, dropped = set(names), [], Counter[str]()
    for entry in AFLOW_PROTOTYPE_LIBRARY:
        label = entry["tags"]["aflow"]
        if wanted and label not in wanted:
            continue
        result = _prototype(label, getattr(entry["snl"], "structure", entry["snl"]))
        if isinstance(result, str):
            dropped[result] += 1
        else:
            found.append(result)
    found.sort(key=lambda proto: (proto.label, proto.structure.composition.formula))
    return found, dropped


def _prototype(label: str, structure: Structure) -> Prototype | str:
    """A prototype, or the reason why it cannot be used."""
    if not structure.is_ordered or len(structure.composition) < 2:
        return "element or partial occupancy"
    analyzer = SpacegroupAnalyzer(structure, symprec=SYMPREC)
    structure = analyzer.find_primitive()
    equivalent = SpacegroupAnalyzer(structure, symprec=SYMPREC).get_symmetry_dataset().equivalent_atoms
    orbits = tuple(tuple(np.flatnonzero(equivalent == first).tolist()) for first in np.unique(equivalent))
    if len(orbits) > MAX_ORBITS:
        return "too many sites"
    guesses = structure.composition.reduced_composition.oxi_state_guesses()
    whole = [guess for guess in guesses if all(state == round(state) != 0 for state in guess.values())]
    if not whole:
        return "no whole charges"
    symbols = [structure[orbit[0]].specie.symbol for orbit in orbits]
    ions = tuple(Species(symbol, round(whole[0][symbol])) for symbol in symbols)
    return Prototype(label, structure, orbits, ions)


def decorations(prototype: Prototype) -> list[Decoration]:
    """The prototype's own classes of orbits, and each with one class split in two, up to four classes."""
    own: dict[Species, list[int]] = {}
    for orbit, ion in enumerate(prototype.ions):
        own.setdefault(ion, []).append(orbit)
    base = [tuple(orbits) for _, orbits in sorted(own.items(), key=lambda item: item[1])]
    found = [base]
    if len(base) < 4:
        for index, orbits in enumerate(base):
            if 2 <= len(orbits) <= 3:
                for split in range(len(orbits) if len(orbits) > 2 else 1):
                    one = (orbits[split],)
                    rest = tuple(orbit for orbit in orbits if orbit not in one)
                    found.append([*base[:index], one, rest, *base[index + 1 :]])
    return [
        Decoration(
            tuple(classes),
            tuple(prototype.ions[orbits[0]] for orbits in classes),
            tuple(sum(len(prototype.orbits[orbit]) for orbit in orbits) for orbits in classes),
        )
        for classes in found
    ]


def neutral(decoration: Decoration, table: Substitutions) -> Iterator[Candidate]:
    """Every choice of different elements for the classes whose charges add up to zero, above the floor."""
    ranked = [table.of(ion) for ion in decoration.ions]
    if not all(ranked):
        return
    best_after = [sum(options[0][0] for options in ranked[index + 1 :]) for index in range(len(ranked))]
    floor = math.log(PROBABILITY_FLOOR)

    def extend(chosen: tuple[Species, ...], log_probability: float, charge: int) -> Iterator[Candidate]:
        index = len(chosen)
        if index == len(ranked):
            if charge == 0:
                yield Candidate(log_probability, decoration, chosen)
            return
        for step, ion in ranked[index]:
            total = log_probability + step
            if total + best_after[index] < floor:
                break
            if all(ion.symbol != other.symbol for other in chosen):
                added = int(ion.oxi_state) * decoration.sizes[index]
                yield from extend((*chosen, ion), total, charge + added)

    yield from extend((), 0.0, 0)


def ordered(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """The candidates from the likeliest, each earlier use of an ion counting against it."""
    named = ((-one.log_probability, tuple(map(str, one.ions)), one) for one in candidates)
    left = sorted(named, key=lambda entry: entry[:2])[:POOL]
    used: Counter[str] = Counter()
    while left:
        costs = [cost + REPEAT_PENALTY * sum(map(used.__getitem__, names)) for cost, names, _ in left]
        _, names, chosen = left.pop(costs.index(min(costs)))
        used.update(names)
        yield chosen
