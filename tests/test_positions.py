"""Wyckoff positions: all 1,731, and points of them by means that know nothing of equations."""

import numpy as np
import pytest

from crystallm_jax.cif import CIFError, spacegroup_operations
from crystallm_jax.cif.positions import GRID, Flat, derive_positions, wyckoff_positions
from crystallm_jax.cif.vocabulary import SPACEGROUPS, SPACEGROUPS_WITHOUT_TOKEN
from crystallm_jax.cif.wyckoff import parse_operations, site_classes
from crystallm_jax.sampling.constrain.places import tables

GROUPS = {**SPACEGROUPS, **SPACEGROUPS_WITHOUT_TOKEN}


def test_there_are_as_many_as_in_the_international_tables() -> None:
    assert sum(len(wyckoff_positions(symbol)) for symbol in GROUPS) == 1731


@pytest.mark.parametrize("symbol", ["P1", "P-1", "C2/m", "Pnma", "I4_1/amd", "R-3m", "P6_3/mmc", "Fd-3m"])
def test_the_table_is_what_the_operations_give(symbol: str) -> None:
    assert derive_positions(spacegroup_operations(symbol)) == wyckoff_positions(symbol)


def test_those_without_free_parameters_are_those_of_the_site_classes() -> None:
    for symbol in GROUPS:
        positions = wyckoff_positions(symbol)
        for multiplicity, count in site_classes(symbol):
            like = [
                p for p in positions if p.multiplicity == multiplicity and p.is_fixed == (count is not None)
            ]
            assert len(like) == count if count is not None else like


@pytest.mark.parametrize("symbol", ["P2_1/c", "Cmcm", "P4/nmm", "R-3c", "P6_3/mmc", "Ia-3d"])
def test_the_orbit_of_a_point_has_as_many_points_as_its_multiplicity_says(symbol: str) -> None:
    rotations, translations = parse_operations(spacegroup_operations(symbol), GRID)
    rng = np.random.default_rng(0)
    for position in wyckoff_positions(symbol):
        for flat in (position.flats[0], position.flats[-1]):
            images = rotations @ _point_of(flat, rng) + translations / GRID
            distinct = np.unique(np.round(images % 1 + 1e-9, 6) % 1, axis=0)
            assert len(distinct) == position.multiplicity


def _point_of(flat: Flat, rng: np.random.Generator) -> np.ndarray:
    """A point of a flat, where nothing else is special."""
    point = rng.uniform(0.01, 0.99, 3)
    for row, constant in zip(flat.rows, flat.constants, strict=True):
        axis = max(i for i in range(3) if row[i])
        point[axis] = (constant / GRID - np.dot(row[:axis], point[:axis])) / row[axis]
    return point


def test_the_forms_that_the_device_looks_up_are_few() -> None:
    table = tables()
    assert table.most <= 200
    assert sum(array.nbytes for array in (table.forms, table.fixed, table.starts, table.counts)) < 2_000_000


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(CIFError, match="'Fm3m' has no known positions"):
        wyckoff_positions("Fm3m")
