"""Makes the table of what atoms take: `python tools/make_atoms.py data/mp_123k`, in some ten minutes on two cores.

The package must be installed; the folder is one that `crystallm prepare` made, of which the training texts are read. Of
each crystal the least distance of each pair of its elements is measured, over all images, and its volume. From these:

- the least distance of a pair of elements: a low percentile over the crystals that have the pair, less a margin; where
  few have it, a share of the sum of two radii, which are fitted to the pairs that many have, unless one was nearer;
- the volume of an element's atoms: a fit of the crystals' volumes by sums over their atoms, robust against those that
  are nearly empty; and what share of that sum crystals take, from a low to a high percentile.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

import crystallm_jax.sampling.constrain
from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.spacegroups import spacegroup_operations
from crystallm_jax.cif.wyckoff import parse_operations
from crystallm_jax.data.store import TokenStore

TABLE = Path(crystallm_jax.sampling.constrain.__file__).with_name("atoms.json")
SITE = re.compile(r"^([A-Z][a-z]?) \S+ (\d+) (\S+) (\S+) (\S+) 1\.0$", re.MULTILINE)
GROUP = re.compile(r"_symmetry_space_group_name_H-M +(\S+)")
CELL = re.compile(r"_cell_(?:length_[abc]|angle_\w+) (\S+)")
GRID = 24
# Images of a site this near to it, in fractions of the cell, are itself after rounding.
ITSELF = 2.5e-4
# No least distance is longer (Å), so no image farther away need be looked at.
FARTHEST = 4.0
PERCENTILE, MARGIN = 0.1, 0.95
# A pair that so many crystals have speaks for itself; radii speak for others, by these shares of their sum.
MANY, RARE, FLOOR = 100, 0.8, 0.6
SHORTEST = 0.65  # Å; the bond of hydrogen has 0.74
VOLUME_PERCENTILES = (0.1, 97.0)


class Crystal(NamedTuple):
    """What was measured: volume in Å^3, atoms by element, least distance in Å by pair of elements."""

    volume: float
    counts: Mapping[str, int]
    distances: Mapping[tuple[str, str], float]


@cache
def operations(symbol: str) -> tuple[np.ndarray, np.ndarray]:
    """Rotations and translations of a space group, these in fractions of the cell."""
    rotations, translations = parse_operations(spacegroup_operations(symbol), GRID)
    return rotations, translations / GRID


def measure(text: str) -> Crystal:
    """Measure the crystal of a text."""
    found = GROUP.search(text)
    if found is None:
        raise ValueError(f"no space group in {text[:60]!r}")
    rotations, translations = operations(found[1])
    lengths, angles = np.split(np.array([float(value) for value in CELL.findall(text)]), 2)
    alpha, beta, gamma = np.cos(np.deg2rad(angles))
    metric = np.array([[1, gamma, beta], [gamma, 1, alpha], [beta, alpha, 1]]) * np.outer(lengths, lengths)
    heights = 1 / np.sqrt(np.diag(np.linalg.inv(metric)))
    reach = np.minimum(np.ceil(FARTHEST / heights + 0.5), 3).astype(int)
    cells = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    sites = [(row[0], int(row[1]), np.array(row[2:], float)) for row in SITE.findall(text)]
    images = [rotations @ point + translations for _, _, point in sites]
    counts, distances = defaultdict(int), {}
    for i, (element, multiplicity, point) in enumerate(sites):
        counts[element] += multiplicity
        for j in range(i, len(sites)):
            steps = images[j] - point
            steps -= np.rint(steps)
            moved = steps[:, None] + cells
            squared = np.einsum("ntx,xy,nty->nt", moved, metric, moved, optimize=True)
            if i == j:
                squared[np.abs(steps).max(axis=1) < ITSELF, len(cells) // 2] = np.inf
            pair = (min(element, sites[j][0]), max(element, sites[j][0]))
            nearest = float(np.sqrt(max(squared.min(), 0)))
            distances[pair] = min(nearest, distances.get(pair, np.inf))
    return Crystal(float(np.sqrt(np.linalg.det(metric))), dict(counts), distances)


def least_distances(crystals: Sequence[Crystal], elements: Sequence[str]) -> np.ndarray:
    """Least distance of each pair of elements, Å, symmetric."""
    seen = defaultdict(list)
    for crystal in crystals:
        for pair, distance in crystal.distances.items():
            seen[pair].append(distance)
    place = {element: i for i, element in enumerate(elements)}
    low = {
        (place[a], place[b]): (
            MARGIN * float(np.sort(found)[int(PERCENTILE / 100 * len(found))]),
            len(found),
        )
        for (a, b), found in seen.items()
    }
    radii = fitted_radii({pair: distance for pair, (distance, n) in low.items() if n >= MANY}, len(elements))
    table = np.zeros((len(elements), len(elements)))
    for i, j in combinations_with_replacement(range(len(elements)), 2):
        total = radii[i] + radii[j]
        pair = (i, j) if elements[i] <= elements[j] else (j, i)
        distance, count = low.get(pair, (np.inf, 0))
        wanted = distance if count >= MANY else min(RARE * total, distance)
        table[i, j] = table[j, i] = max(wanted, FLOOR * total, SHORTEST)
    return table


def fitted_radii(distances: Mapping[tuple[int, int], float], count: int) -> np.ndarray:
    """Radii whose sums come nearest to distances, those far off counting less; 1.2 Å for elements that have none."""
    pairs = list(distances)
    sums = np.zeros((len(pairs), count))
    for row, (i, j) in zip(sums, pairs, strict=True):
        row[i] += 1
        row[j] += 1
    wanted, weight = np.array([distances[pair] for pair in pairs]), np.ones(len(pairs))
    radii = np.full(count, 1.2)
    for _ in range(10):
        left = np.vstack([sums * weight[:, None], 0.1 * np.eye(count)])
        radii = np.linalg.lstsq(left, np.append(wanted * weight, np.full(count, 0.12)), rcond=None)[0]
        weight = 1 / np.maximum(1, np.abs(wanted - sums @ radii) / 0.15)
    return radii


def fitted_volumes(crystals: Sequence[Crystal], elements: Sequence[str]) -> tuple[np.ndarray, list[float]]:
    """Volume of an atom of each element, Å^3, and the percentiles of what crystals take of the sum over their atoms."""
    place = {element: i for i, element in enumerate(elements)}
    atoms, volume = np.zeros((len(crystals), len(elements))), np.array([c.volume for c in crystals])
    for row, crystal in zip(atoms, crystals, strict=True):
        for element, count in crystal.counts.items():
            row[place[element]] = count
    shares, weight = atoms / volume[:, None], np.ones(len(crystals))
    for _ in range(6):
        volumes, _ = nnls(shares * weight[:, None], weight)
        weight = 1 / np.maximum(1, np.abs(np.log(shares @ volumes)) / 0.15)
    missing = atoms.sum(axis=0) == 0
    volumes[missing] = np.median(volumes[~missing])
    return volumes, np.percentile(1 / (shares @ volumes), VOLUME_PERCENTILES).tolist()


def write(crystals: Sequence[Crystal], source: str) -> None:
    """Fit the table and write it."""
    elements = list(ELEMENTS)
    volumes, shares = fitted_volumes(crystals, elements)
    distances = least_distances(crystals, elements)
    rows = [
        json.dumps([symbol, round(volume, 2), *row[: i + 1].round(2).tolist()])
        for i, (symbol, volume, row) in enumerate(zip(elements, volumes.tolist(), distances, strict=True))
    ]
    about = f"least distances in Å and volumes in Å^3 of atoms, from {len(crystals)} crystals of {source}"
    body = ",\n".join(rows)
    shares_text = json.dumps([round(share, 3) for share in shares])
    TABLE.write_text(
        f'{{"about": {json.dumps(about)},\n"volume_shares": {shares_text},\n"atoms": [\n{body}\n]}}\n',
        "utf-8",
    )
    print(f"{TABLE}: {about}")


def _measure_some(folder: str, begin: int, end: int) -> list[Crystal]:
    store = TokenStore.open(folder, "train")
    return [measure(store.text(i)) for i in range(begin, min(end, len(store)))]


def main() -> None:
    """Measure all training crystals of a folder and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="as `crystallm prepare` makes it")
    parser.add_argument("--source", default="the Materials Project", help="named in the table (%(default)s)")
    args = parser.parse_args()
    begins = range(0, len(TokenStore.open(args.folder, "train")), 500)
    with ProcessPoolExecutor() as pool:
        parts = pool.map(
            _measure_some, *zip(*((args.folder, begin, begin + 500) for begin in begins), strict=True)
        )
        write(list(chain.from_iterable(parts)), args.source)


if __name__ == "__main__":
    main()
