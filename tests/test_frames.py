"""Structures of every form are those that the same crystal's CIF gives, and only `CIFError` comes out of bad ones."""

import contextlib
import io
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import write
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from crystallm_jax.cif import CIFError, symmetrized_cif
from crystallm_jax.data.readers import read_records
from crystallm_jax.data.reading.frames import structure_of
from crystallm_jax.data.reading.structures import parse_structure
from crystallm_jax.data.record import Form, Record

NAMES = ("rocksalt", "perovskite", "halite_symmetric")


def _extxyz(structure: Structure) -> str:
    stream = io.StringIO()
    # As of 3.29 ASE sets the shape of arrays, which NumPy 2.5 warns of.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        write(stream, AseAtomsAdaptor.get_atoms(structure, msonable=False), format="extxyz")
    return stream.getvalue()


def _columns(structure: Structure) -> dict[str, Any]:
    return {
        "lattice_vectors": structure.lattice.matrix.tolist(),
        "species_at_sites": [site.specie.symbol for site in structure],
        "cartesian_site_positions": structure.cart_coords.tolist(),
    }


def _records(structure: Structure) -> list[Record]:
    forms: list[tuple[str, Form]] = [
        (_extxyz(structure), "extxyz"),
        (json.dumps(structure.as_dict()), "json"),
        (json.dumps(_columns(structure)), "json"),
    ]
    return [Record("x", text, form=form) for text, form in forms]


def _json(**changes: Any) -> Record:
    row = Structure(Lattice.cubic(4), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]).as_dict()
    return Record("x", json.dumps(row | changes), form="json")


@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_the_text_of_the_cif(fixtures: Path, name: str) -> None:
    text = (fixtures / "data" / f"{name}.cif").read_text()
    expected = parse_structure(text)
    assert structure_of(Record("x", text)) == expected
    turned = expected.copy()
    turned.apply_operation(_rotation())
    for record in (*_records(expected), *_records(turned)):
        found = structure_of(record)
        assert [site.specie for site in found] == [site.specie for site in expected]
        assert symmetrized_cif(found) == symmetrized_cif(expected)


def _rotation() -> Any:
    from pymatgen.core.operations import SymmOp

    return SymmOp.from_axis_angle_and_translation([1, 2, 3], 37)


def test_real_crystals_are_those_of_their_cif(crystals: Path) -> None:
    for number, record in enumerate(read_records(crystals / "mp_26k" / "val.csv.gz")):
        if number % 20 == 0:
            expected = parse_structure(record.text)
            for found in map(structure_of, _records(expected)):
                assert found.species == expected.species
                assert np.allclose(found.lattice.parameters, expected.lattice.parameters, atol=1e-7)
                apart = found.frac_coords - expected.frac_coords
                assert np.abs(apart - np.round(apart)).max() < 2e-8


def test_a_left_handed_cell_is_not_mirrored() -> None:
    """Quartz is chiral: in P3_121 or P3_221, whichever axes it is given in."""
    lattice = Lattice.hexagonal(4.9137, 5.4047)
    quartz = Structure.from_spacegroup(
        "P3_221", lattice, ["Si", "O"], [[0.4697, 0, 2 / 3], [0.4133, 0.2672, 0.7855]]
    )
    exchange = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    left = Structure(exchange @ lattice.matrix, quartz.species, quartz.frac_coords @ exchange.T)
    assert np.linalg.det(left.lattice.matrix) < 0
    assert np.allclose(left.cart_coords, quartz.cart_coords)
    for structure in (quartz, left):
        for record in _records(structure):
            assert "P3_221\n" in symmetrized_cif(structure_of(record))


def test_charges_and_the_names_of_classes_are_not_looked_at() -> None:
    salt = Structure(Lattice.cubic(4), ["Cs+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    row = salt.as_dict() | {
        "@module": "os",
        "@class": "system",
        "properties": {"@module": "os", "@class": "abort"},
    }
    found = structure_of(Record("x", json.dumps(row), form="json"))
    assert found.formula == "Cs1 Cl1"
    assert not any(hasattr(site.specie, "oxi_state") for site in found)
    sites = [
        {"species": [{"element": "Cs+"}], "xyz": [0, 0, 0]},
        {"species": [{"element": "Cl1-"}], "xyz": [2, 2, 2]},
    ]
    lattice = {"a": 4, "b": 4, "c": 4, "alpha": 90, "beta": 90, "gamma": 90}
    again = structure_of(Record("x", json.dumps({"lattice": lattice, "sites": sites}), form="json"))
    assert np.allclose(again.frac_coords, found.frac_coords)


SITE = {"species": [{"element": "Na", "occu": 1}], "abc": [0, 0, 0]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_json(sites=[SITE | {"species": [{"element": "Na", "occu": 0.5}]}]), "site 1 is partially occupied"),
        (_json(sites=[SITE | {"species": [{"element": "Na"}, {"element": "K"}]}]), "partially occupied"),
        (_json(sites=[SITE | {"species": [{"element": "X"}]}]), "'X' has no token"),
        (_json(sites=[SITE | {"species": [{"element": "Po"}]}]), "'Po' has no token"),
        (_json(sites=[SITE] * 2001), "2,001 atoms"),
        (_json(sites=[]), "do not belong together"),
        (_json(sites=[SITE | {"abc": [0, 0]}]), "do not belong together"),
        (_json(sites=[SITE | {"abc": ["0", "0", "0"]}]), "no number"),
        (_json(sites=[SITE | {"abc": [0, 0, float("nan")]}]), "no number within reason"),
        (_json(sites=[SITE | {"abc": [0, 0, 10**400]}]), "no number"),
        (_json(sites={"a": 1}), "a list was expected"),
        (_json(lattice={"matrix": [[1, 0, 0], [0, 1, 0], [1, 1, 0]]}), "volume of 0"),
        (_json(lattice={"matrix": [[1, 0], [0, 1]]}), "do not belong together"),
        (_json(lattice={"matrix": [[1e300, 0, 0], [0, 1, 0], [0, 0, 1]]}), "within reason"),
        (_json(lattice={"matrix": np.eye(3).tolist(), "pbc": [True, True, False]}), "not periodic"),
        (_json(lattice=None), "no structure could be read from the JSON object"),
        (Record("x", "[]", form="json"), "no structure could be read"),
        (Record("x", "{", form="json"), "no structure could be read"),
        (Record("x", "[" * 100_000, form="json"), "no structure could be read"),
        (Record("x", '{"lattice_vectors": 1}', form="json"), "no structure could be read"),
        (Record("x", "2\nnothing\nNa 0 0 0\nCl 1 1 1\n", form="extxyz"), "not periodic"),
        (
            Record("x", '1\nLattice="4 0 0 0 4 0 0 0 4" pbc="T T F"\nNa 0 0 0\n', form="extxyz"),
            "not periodic",
        ),
        (Record("x", '1\nLattice="4 0 0 0 4 0 0 0 4"\nQq 0 0 0\n', form="extxyz"), "."),
        (Record("x", '1\nLattice="4 0 0 0 4 0 0 0 4"\nX 0 0 0\n', form="extxyz"), "'X' has no token"),
        (Record("x", '3000\nLattice="4 0 0 0 4 0 0 0 4"\nNa 0 0 0\n', form="extxyz"), "3,000 atoms"),
        (Record("x", '0\nLattice="4 0 0 0 4 0 0 0 4"\n', form="extxyz"), "."),
        (Record("x", "", form="extxyz"), "no structure could be read"),
        (Record("x", "", form="cif"), "."),
    ],
)
def test_what_is_no_crystal_is_a_cif_error(record: Record, message: str) -> None:
    with pytest.raises(CIFError, match=message) as caught:
        structure_of(record)
    assert "\n" not in str(caught.value)


def test_nothing_but_a_cif_error_comes_out_of_mutated_texts(fixtures: Path) -> None:
    chance = random.Random(3)
    records = _records(parse_structure((fixtures / "data" / "rocksalt.cif").read_text()))
    characters = '0123456789.eE+-"[]{}:, \nNaClTFPropertiesnulltrue\x00é'
    for _ in range(400):
        record = chance.choice(records)
        text = list(record.text)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(text))
            text[place : place + chance.randint(0, 12)] = chance.choices(characters, k=chance.randint(0, 4))
        with contextlib.suppress(CIFError):
            structure_of(record._replace(text="".join(text)))
