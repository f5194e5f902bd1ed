"""Distances and volumes that are looked at on the device, beside the same by all images of all atoms."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymatgen.core import Lattice
from pymatgen.core.operations import SymmOp

from crystallm_jax.cif import SPACEGROUPS, spacegroup_operations
from crystallm_jax.sampling.constrain import Automaton, AutomatonState, idle_state, look
from crystallm_jax.sampling.constrain.atoms import LEAST_HEIGHT, atom_tables
from crystallm_jax.sampling.constrain.looks import Verdict, judge_site
from crystallm_jax.sampling.constrain.nodes import TOKEN_ID, Kind, Node
from crystallm_jax.sampling.constrain.state import Placed
from crystallm_jax.sampling.constrain.volumes import cell_fits, volume_bounds

UNIT = 10_000
ROWS = 8


class Crystal(NamedTuple):
    """A space group, a cell, and sites: element, multiplicity, coordinates."""

    group: str
    cell: tuple[float, ...]
    sites: Sequence[tuple[str, int, tuple[float, float, float]]]


ROCK_SALT = Crystal(
    "Fm-3m", (5.64, 5.64, 5.64, 90, 90, 90), [("Na", 4, (0, 0, 0)), ("Cl", 4, (0.5, 0.5, 0.5))]
)


def _registers(crystals: Sequence[Crystal]) -> AutomatonState:
    """The registers of rows that have written crystals."""
    state = jax.tree.map(np.array, idle_state(Automaton("positions"), ROWS))
    for row, crystal in enumerate(crystals):
        elements = sorted({element for element, *_ in crystal.sites})
        state.elements[row, : len(elements)] = [TOKEN_ID[element] for element in elements]
        for element, multiplicity, _ in crystal.sites:
            state.counts[row, elements.index(element)] += multiplicity
        state.group_number[row] = SPACEGROUPS[crystal.group]
        state.cell[row] = np.rint(np.array(crystal.cell) * UNIT)
        state.site[row], state.kinds[row, 0], state.node[row] = len(crystal.sites), Kind.SITES, Node.ELEMENT
        for number, (element, multiplicity, point) in enumerate(crystal.sites):
            x, y, z = np.rint(np.array(point) * UNIT).astype(int) % UNIT
            state.sites[row, number] = x * UNIT + y, z
            state.placed[row, number, [Placed.ELEMENT, Placed.MULTIPLICITY]] = (
                elements.index(element),
                multiplicity,
            )
    return jax.tree.map(jnp.asarray, state)


def _verdicts(crystals: Sequence[Crystal], sites: Sequence[int]) -> list[tuple[bool, ...]]:
    padded = jnp.full(ROWS, -1, jnp.int32).at[: len(sites)].set(jnp.array(sites, jnp.int32))
    verdict = Verdict(*map(np.asarray, jax.jit(judge_site)(_registers(crystals), padded)))
    return [(bool(n), bool(s), bool(a)) for n, s, a in zip(*verdict, strict=True)][: len(sites)]


def _nearest_share(crystal: Crystal, site: int) -> float:
    """The least distance of a site's atoms to those before it and to each other, over the least of their elements."""
    lattice = Lattice.from_parameters(*crystal.cell)
    operations = [SymmOp.from_xyz_str(line) for line in spacegroup_operations(crystal.group)]
    cells = np.array(list(product(range(-6, 7), repeat=3)))
    table, (mine, _, point) = atom_tables().distances, crystal.sites[site]
    shares = []
    for other, (element, _, coordinates) in enumerate(crystal.sites[: site + 1]):
        images = np.stack([operation.operate(np.array(coordinates)) for operation in operations]) - point
        steps = (images - np.rint(images))[:, None] + cells
        if other == site:
            steps = steps[np.abs(steps).max(axis=2) > 3e-4]
        distances = np.linalg.norm(lattice.get_cartesian_coords(steps.reshape(-1, 3)), axis=1)
        shares.append(distances.min() / table[TOKEN_ID[mine], TOKEN_ID[element]])
    return float(min(shares))


def test_what_is_near_is_found_in_skewed_cells_too() -> None:
    rng = np.random.default_rng(0)
    crystals: list[Crystal] = []
    shapes = {
        "P1": (35, 90, 70),
        "P-1": (62, 75, 48),
        "C2/c": (90, 128, 90),
        "R-3m": (90, 90, 120),
        "Pnma": (90,) * 3,
    }
    while len(crystals) < 64:
        group = str(rng.choice(list(shapes)))
        lengths = rng.uniform(3.5, 9, 3)
        if group == "R-3m":
            lengths[1] = lengths[0]
        count = len(spacegroup_operations(group))
        points = np.round(rng.uniform(0, 1, (2, 3)), 4)
        crystals.append(
            Crystal(
                group,
                (*np.round(lengths, 4), *shapes[group]),
                [("Na", count, tuple(points[0])), ("Cl", count, tuple(points[1]))],
            )
        )
    near, apart = 0, 0
    for begin in range(0, len(crystals), ROWS):
        part = crystals[begin : begin + ROWS]
        for crystal, (found, special, rounded) in zip(part, _verdicts(part, [1] * ROWS), strict=True):
            share = _nearest_share(crystal, 1)
            if abs(share - 1) > 1e-3:
                assert found == (share < 1), crystal
            near, apart = near + found, apart + (not found)
            assert not special
            assert not rounded
    assert min(near, apart) > 5


@pytest.mark.parametrize(
    ("group", "multiplicity", "point", "expected"),
    [
        ("Fm-3m", 4, (0, 0, 0), (False, False, False)),
        # A line through a point of fewer images: these fall onto each other.
        ("Fm-3m", 24, (0, 0, 0), (False, True, False)),
        ("P6_3/mmc", 2, (0.3333, 0.6667, 0.25), (False, False, False)),
        ("P6_3/mmc", 6, (0.2, 0.4, 0.25), (False, False, False)),
        # Coordinates that were rounded: pymatgen reads twice as many atoms.
        ("P6_3/mmc", 6, (0.2, 0.4001, 0.25), (False, False, True)),
        # Here the images are near enough to be one, but elsewhere in the cell they are not.
        ("R-3c", 18, (0.2473, 0.9139, 0.0833), (False, False, True)),
        # Beside a mirror, not on it.
        ("Pnma", 8, (0.1, 0.26, 0.3), (True, False, False)),
    ],
)
def test_a_site_has_the_multiplicity_that_it_states(
    group: str, multiplicity: int, point: tuple[float, float, float], expected: tuple[bool, ...]
) -> None:
    angles = (90, 90, 120) if group.startswith(("P6", "R")) else (90, 90, 90)
    crystal = Crystal(group, (12, 12, 12, *angles), [("He", multiplicity, point)])
    assert _verdicts([crystal], [0]) == [expected]


def test_parts_pass_up_to_the_first_that_cannot_stay() -> None:
    crowded = ROCK_SALT._replace(cell=(5.4, 5.4, 5.4, 90, 90, 90))._replace(
        sites=[*ROCK_SALT.sites, ("Cl", 8, (0.25, 0.25, 0.25)), ("Na", 4, (0.5, 0, 0))]
    )
    flat = ROCK_SALT._replace(cell=(2.5, 2.5, 2.5, 90, 90, 90))
    empty = ROCK_SALT._replace(cell=(20, 20, 20, 90, 90, 90))
    crystals = [ROCK_SALT, crowded, flat, empty]
    state = _registers(crystals)
    # The cell of so many atoms is larger.
    state = replace(state, counts=state.counts.at[1].set(state.counts[0]))
    state, failed = jax.jit(look)(state)
    assert failed[:4].tolist() == [-1, 3, 0, 0]
    assert state.passed[:4].tolist() == [3, 3, 0, 0]
    again, failed = jax.jit(look)(state)
    assert failed[:4].tolist() == [-1, 3, 0, 0]
    assert again.passed[:4].tolist() == [3, 3, 0, 0]
    assert (np.asarray(failed[4:]) == -1).all()


def test_a_cell_that_is_nearly_flat_is_none() -> None:
    thin = Crystal("P1", (12, 12, 4.2, 90, 90, 170), [("Na", 1, (0, 0, 0))])
    height = 12 * np.sin(np.deg2rad(10))
    assert height > LEAST_HEIGHT
    thinner = thin._replace(cell=(8, 8, 30, 90, 90, 170))
    fits = np.asarray(cell_fits(_registers([thinner, thinner._replace(cell=(4, 4, 4, 90, 90, 90))])))
    assert fits[:2].tolist() == [False, False]


def test_the_volume_is_what_lengths_and_angles_give() -> None:
    rng = np.random.default_rng(1)
    lengths, angles = rng.uniform(2, 40, (ROWS, 3)), rng.uniform(65, 115, (ROWS, 3))
    exact = [Lattice.from_parameters(*a, *b).volume for a, b in zip(lengths, angles, strict=True)]
    cell = np.rint(np.concatenate([lengths, angles], axis=1) * UNIT).astype(np.int32)
    least, most = map(np.asarray, volume_bounds(jnp.asarray(cell)))
    assert (least <= np.array(exact) * UNIT).all()
    assert (np.array(exact) * UNIT <= most).all()
    assert (most <= least * 1.001 + 2).all()
