"""Makes the embedded corpus: `python tools/make_corpus.py --out crystallm_jax/data/corpus.csv.xz`.

The package must be installed. Everything comes from what pymatgen ships. Each AFLOW prototype whose ions have
whole charges is decorated with other ions, as Hautier et al. (2011, doi:10.1021/ic102031h) rank them, so that
the charges add up to zero; the cell gets the volume of the data-mined lattice scaling (DLS) predictor;
what is not chemically sensible or not valid is dropped and counted. No step draws a random number and every
order is stated, so that two runs give the same bytes.
"""

import argparse
import csv
import io
import itertools
import lzma
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ionic_decoration import (
    Candidate,
    Prototype,
    Substitutions,
    decorations,
    load_prototypes,
    neutral,
    ordered,
)
from pymatgen.analysis.structure_prediction.volume_predictor import DLSVolumePredictor
from pymatgen.core import Element, Species, Structure
from tqdm import tqdm

from crystallm_jax.cif import (
    CIFTokenizer,
    preprocess_cif,
    stream_text,
    symmetrized_cif,
)
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import validate
from crystallm_jax.files import new_file

COUNT = 3000
MAX_TOKENS = 700
SYMPREC = 0.1
# A prototype offers at most so many structures, out of at most so many tries.
PER_PROTOTYPE = 50
TRIES = 150
# The selection's limits: structures of one chemical system, and an element's share of all structures.
PER_SYSTEM = 3
SHARE = 0.10
# The share is at least so many structures: a small build would hold next to nothing otherwise.
LEAST = 12
SHARES = {"O": 0.27, "F": 0.15, "S": 0.15, "Se": 0.13, "Cl": 0.12}
# The predictor's own bounds (0.5 and 1.5) would leave cells of prototypes with much smaller ions too tight.
SCALING = {"min_scaling": 0.3, "max_scaling": 4.0}
# Bounds on contacts, as shares of the sum of the ionic radii: opposite charges, two anions, two cations.
# Polyanions (S-S, N-N) cross them and are not made.
BOND_RANGE = (0.72, 1.25)
ANION_CONTACT = 0.8
CATION_CONTACT = 1.0
CONTACT_CUTOFF = 4.5
# Radii in ångström of anions that Shannon's table lacks, near Pauling's; C, Si, Ge after their compounds.
ANION_RADII = {"P": 2.1, "As": 2.2, "Sb": 2.4, "Bi": 2.4, "H": 1.4, "C": 1.6, "Si": 2.0, "Ge": 2.0}
# Symmetrising a text anew must give the text again; so many rounds are tried.
ROUNDS = 3
COLUMNS = ("id", "prototype", "charges", "cif")


class Row(NamedTuple):
    """A structure of the corpus; `key` is its cell formula and space group."""

    id: str
    prototype: str
    charges: str
    cif: str
    key: tuple[str, str]
    elements: tuple[str, ...]


class Offer(NamedTuple):
    """What a prototype gave: rows from the likeliest, and the tries that failed by reason."""

    rows: list[Row]
    dropped: Counter[str]


def decorate(prototype: Prototype, candidate: Candidate) -> Structure:
    """The prototype with the candidate's ions, at the volume that the DLS predictor gives."""
    symbols = [""] * len(prototype.structure)
    for orbits, ion in zip(candidate.decoration.classes, candidate.ions, strict=True):
        for site in itertools.chain.from_iterable(prototype.orbits[orbit] for orbit in orbits):
            symbols[site] = ion.symbol
    plain = Structure(prototype.structure.lattice, symbols, prototype.structure.frac_coords)
    return DLSVolumePredictor(**SCALING).get_predicted_structure(plain)


def bad_contact(structure: Structure, ions: Iterable[Species]) -> str | None:
    """Why the distances make no chemical sense, or None.

    Every atom's nearest neighbour must be a counter-ion, at a distance near the sum of the ionic radii, and
    atoms of one charge must keep apart.
    """
    charges = {ion.symbol: ion.oxi_state for ion in ions}
    radii = {ion.symbol: ionic_radius(ion) for ion in ions}
    charge = np.array([charges[site.specie.symbol] for site in structure])
    radius = np.array([radii[site.specie.symbol] for site in structure])
    one, two, _, distance = structure.get_neighbor_list(CONTACT_CUTOFF)
    share = distance / (radius[one] + radius[two])
    opposite = charge[one] * charge[two] < 0
    for site in range(len(structure)):
        bonds, likes = (one == site) & opposite, (one == site) & ~opposite
        if not bonds.any() or (likes.any() and distance[likes].min() <= distance[bonds].min()):
            return "nearest neighbour has the same charge"
        if not BOND_RANGE[0] <= share[bonds].min() <= BOND_RANGE[1]:
            return "bond length against ionic radii"
    anions, cations = ~opposite & (charge[one] < 0), ~opposite & (charge[one] > 0)
    if (share[anions] < ANION_CONTACT).any() or (share[cations] < CATION_CONTACT).any():
        return "like charges too close"
    return None


def ionic_radius(ion: Species) -> float:
    """The ion's own radius where the tables have one, else that of its element; ångström."""
    if ion.oxi_state < 0 and ion.symbol in ANION_RADII:
        return ANION_RADII[ion.symbol]
    element = Element(ion.symbol)
    return max(float(ion.ionic_radius or element.average_ionic_radius or element.atomic_radius), 0.1)


def settle(structure: Structure) -> tuple[str, str] | str:
    """A symmetrised text that symmetrises to itself and its token stream, or why there is none."""
    text = symmetrized_cif(structure, symprec=SYMPREC)
    stream = stream_text(preprocess_cif(text))
    for _ in range(ROUNDS):
        read = Structure.from_str(text, fmt="cif")
        if read.composition.reduced_formula != structure.composition.reduced_formula:
            return "atoms merged on reading"
        again = symmetrized_cif(read, symprec=SYMPREC)
        again_stream = stream_text(preprocess_cif(again))
        if again_stream == stream:
            return text, stream
        text, stream = again, again_stream
    return "symmetry does not settle"


def build(prototype: Prototype, candidate: Candidate) -> Row | str:
    """The row of a decorated prototype, or the reason why it is dropped."""
    structure = decorate(prototype, candidate)
    if (reason := bad_contact(structure, candidate.ions)) is not None:
        return reason
    try:
        settled = settle(structure)
    except CIFError:
        return "not in the dialect (space group without a token)"
    if isinstance(settled, str):
        return settled
    text, stream = settled
    if len(CIFTokenizer().encode_cif(stream)) > MAX_TOKENS:
        return "too many tokens"
    # Judged as a model would write it, with four decimals.
    report = validate(stream)
    if not report.valid:
        return f"not valid: {report.reasons[0]}"
    formula, spacegroup = (
        stream.split(tag, 1)[1].split("\n", 1)[0].strip() for tag in ("data_", SPACEGROUP_TAG)
    )
    return Row(
        id=f"aflow-{prototype.label}-{formula}",
        prototype=prototype.label,
        charges=" ".join(map(str, candidate.ions)),
        cif=text,
        key=(formula, spacegroup),
        elements=tuple(sorted(ion.symbol for ion in candidate.ions)),
    )


def offer(prototype: Prototype, table: Substitutions) -> Offer:
    """What a prototype gives, whatever the others give: rows with different keys.

    They come from the likeliest, in turn from the prototype's own decoration and from those with a
    class split.
    """
    own, *split = decorations(prototype)
    queues = (
        ordered(neutral(own, table)),
        ordered(itertools.chain.from_iterable(neutral(x, table) for x in split)),
    )
    candidates = (one for pair in itertools.zip_longest(*queues) for one in pair if one is not None)
    found: dict[tuple[str, str], Row] = {}
    dropped: Counter[str] = Counter()
    for candidate in itertools.islice(candidates, TRIES):
        if len(found) == PER_PROTOTYPE:
            break
        result = build(prototype, candidate)
        if isinstance(result, str):
            dropped[result] += 1
        elif result.key in found:
            dropped["same formula and space group"] += 1
        else:
            found[result.key] = result
    return Offer(list(found.values()), dropped)


def select(offers: Sequence[Sequence[Row]], count: int) -> tuple[list[Row], Counter[str]]:
    """Up to `count` rows, from each prototype in turn, within the limits of systems and elements.

    Returns:
        The rows sorted by id, and how many were left out by reason.
    """
    queues = [list(reversed(rows)) for rows in offers]
    chosen: dict[str, Row] = {}
    keys: set[tuple[str, str]] = set()
    systems: Counter[tuple[str, ...]] = Counter()
    uses: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    while any(queues) and len(chosen) < count:
        for queue in queues:
            while queue and len(chosen) < count:
                row = queue.pop()
                if row.key in keys or row.id in chosen:
                    dropped["same formula and space group"] += 1
                elif systems[row.elements] >= PER_SYSTEM:
                    dropped["chemical system is full"] += 1
                elif any(
                    uses[symbol] >= max(LEAST, SHARES.get(symbol, SHARE) * count) for symbol in row.elements
                ):
                    dropped["element is full"] += 1
                else:
                    chosen[row.id] = row
                    keys.add(row.key)
                    systems[row.elements] += 1
                    uses.update(row.elements)
                    break
    dropped["more than asked for"] += sum(map(len, queues))
    return [chosen[name] for name in sorted(chosen)], dropped


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the rows as xz-compressed CSV, whole or not at all."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((row.id, row.prototype, row.charges, row.cif) for row in rows)
    with new_file(path) as partial:
        partial.write_bytes(lzma.compress(table.getvalue().encode(), preset=9 | lzma.PRESET_EXTREME))


def summary(rows: Sequence[Row], dropped: Counter[str], path: Path) -> str:
    """A few lines on what the corpus holds and what was dropped, by reason."""
    elements = Counter(symbol for row in rows for symbol in row.elements)
    sizes = Counter(len(row.elements) for row in rows)
    spacegroups = Counter(row.key[1] for row in rows)
    lines = [
        f"{path}: {len(rows)} structures, {path.stat().st_size:,} bytes, {len(spacegroups)} space groups, "
        f"{len(elements)} elements, {len({row.prototype for row in rows})} prototypes, "
        f"{len({row.elements for row in rows})} chemical systems",
        "elements a structure: " + ", ".join(f"{size}: {n}" for size, n in sorted(sizes.items())),
        "commonest elements: " + ", ".join(f"{symbol} {n}" for symbol, n in elements.most_common(12)),
        "commonest space groups: " + ", ".join(f"{symbol} {n}" for symbol, n in spacegroups.most_common(12)),
        "dropped:",
    ]
    return "\n".join([*lines, *(f"{n:8,}  {reason}" for reason, n in dropped.most_common() if n)])


def main() -> int:
    """Make the corpus and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file to write (.csv.xz)")
    parser.add_argument("--limit", type=int, default=COUNT, help=f"structures at most (default {COUNT})")
    parser.add_argument("--prototypes", default="", help="AFLOW labels, separated by commas (default: all)")
    options = parser.parse_args()
    prototypes, dropped = load_prototypes(filter(None, options.prototypes.split(",")))
    dropped = Counter({f"prototype: {reason}": n for reason, n in dropped.items()})
    if not prototypes:
        print(
            f"no usable prototype in {options.prototypes!r}: give labels as AB_cF8_225_a_b", file=sys.stderr
        )
        return 1
    table, offers = Substitutions(), []
    for prototype in tqdm(prototypes, unit="prototype", disable=None):
        made = offer(prototype, table)
        offers.append(made.rows)
        dropped.update({f"structure: {reason}": n for reason, n in made.dropped.items()})
    rows, left = select(offers, options.limit)
    dropped.update({f"selection: {reason}": n for reason, n in left.items()})
    write(rows, options.out)
    print(summary(rows, dropped, options.out))
    return 0


if __name__ == "__main__":
    # pymatgen warns of each ion without a radius, of each rounded coordinate and of each guess.
    warnings.filterwarnings("ignore", category=UserWarning)
    sys.exit(main())
