"""Oxidation states: read from texts, guessed from formulas, and written as the last property column."""

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.cif import (
    CIFError,
    CIFTokenizer,
    postprocess_cif,
    preprocess_cif,
    stream_text,
    symmetrized_cif,
)
from crystallm_jax.cif.oxidation import (
    complete_oxidation_states,
    printed_radius,
    printed_state,
    take_oxidation_states,
)

HEADER = """loop_
 _atom_type_symbol
 _atom_type_electronegativity
 _atom_type_radius
 _atom_type_ionic_radius
 _atom_type_oxidation_number
"""


def salt(first="Na", second="Cl"):
    from pymatgen.core import Lattice, Structure

    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), [first, second], [[0, 0, 0], [0.5] * 3])


def spinel(iron_a="Fe", iron_b="Fe", oxygen="O"):
    from pymatgen.core import Lattice, Structure

    sites = [[0.0] * 3, [0.625] * 3, [0.3797] * 3]
    return Structure.from_spacegroup("Fd-3m", Lattice.cubic(8.39), [iron_a, iron_b, oxygen], sites)


def written(structure):
    """The text of pymatgen's own writer, which states the charges."""
    from pymatgen.io.cif import CifWriter

    with warnings.catch_warnings(action="ignore"):
        return str(CifWriter(structure, symprec=0.1))


def property_rows(text):
    _, _, after = text.partition(HEADER)
    return [line.split() for line in after.partition("_symmetry")[0].splitlines()]


def test_stated_states():
    text = preprocess_cif(written(salt("Na+", "Cl-")), oxidation_states=True)
    assert property_rows(text) == [
        ["Na", "0.9300", "1.8000", "1.1600", "1.0"],
        ["Cl", "3.1600", "1.0000", "1.6700", "-1.0"],
    ]
    plain = preprocess_cif(symmetrized_cif(salt()))
    sites = "_atom_site_type_symbol"
    assert text.count("_atom_type_symbol") == 1
    assert text.partition(sites)[2].replace("  1\n", "  1.0\n") == plain.partition(sites)[2]


def test_guessed_states_are_the_same():
    stated = preprocess_cif(written(salt("Na+", "Cl-")), oxidation_states=True)
    guessed = preprocess_cif(symmetrized_cif(salt()), oxidation_states=True)
    assert property_rows(guessed) == property_rows(stated)


def test_given_states():
    text = symmetrized_cif(salt())
    rows = property_rows(preprocess_cif(text, oxidation_states={"Na": -1.0, "Cl": 1.0, "O": -2.0}))
    assert [row[-1] for row in rows] == ["-1.0", "1.0"]
    with pytest.raises(CIFError, match="oxidation_states lacks Na, Cl: give every element"):
        preprocess_cif(text, oxidation_states={})


@pytest.mark.parametrize("stated", [True, False])
def test_mixed_valence_has_the_mean_and_the_average_radius(stated):
    structure = spinel("Fe3+", "Fe2.5+", "O2-") if stated else spinel()
    text = preprocess_cif(written(structure) if stated else symmetrized_cif(structure), oxidation_states=True)
    iron, oxygen = property_rows(text)
    assert iron == ["Fe", "1.8300", "1.4000", "0.8525", "2.6667"]
    assert oxygen[-2:] == ["1.2600", "-2.0"]


def test_several_states_of_an_element_are_weighed_by_multiplicity():
    states = take_oxidation_states(written(spinel("Fe2+", "Fe3+", "O2-"))).states
    assert states == pytest.approx({"Fe": 8 / 3, "O": -2})


def test_an_element_alone_is_neutral():
    from pymatgen.core import Lattice, Structure

    copper = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]])
    assert property_rows(preprocess_cif(symmetrized_cif(copper), oxidation_states=True)) == [
        ["Cu", "1.9000", "1.3500", "0.8200", "0.0"]
    ]


def test_no_assignment():
    with pytest.raises(CIFError, match=r"oxidation states of Cu1Au1: none of the usual ones balance; state"):
        preprocess_cif(symmetrized_cif(salt("Cu", "Au")), oxidation_states=True)
    many = dict.fromkeys(["Mn", "V", "W", "Nb", "C", "N", "S", "P"], 2) | {"O": 9}
    with pytest.raises(CIFError, match="too many ways to balance"):
        complete_oxidation_states(many, {})


@pytest.mark.parametrize("structure", [salt(), spinel()], ids=["salt", "spinel"])
def test_texts_with_states_are_tokenised_and_come_back(structure):
    tokenizer = CIFTokenizer()
    symmetrized = symmetrized_cif(structure)
    ids = tokenizer.encode_cif(stream_text(preprocess_cif(symmetrized, oxidation_states=True)))
    assert tokenizer.unk_id not in ids
    assert tokenizer.token_to_id["_atom_type_oxidation_number"] in ids
    plain = tokenizer.encode_cif(stream_text(preprocess_cif(symmetrized)))
    assert postprocess_cif(tokenizer.decode(ids)) == postprocess_cif(tokenizer.decode(plain))


def test_texts_with_states_are_validated():
    from crystallm_jax.evaluation import validate

    tokenizer = CIFTokenizer()
    ids = tokenizer.encode_cif(stream_text(preprocess_cif(symmetrized_cif(salt()), oxidation_states=True)))
    assert validate(postprocess_cif(tokenizer.decode(ids))).valid


SITES = """loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_symmetry_multiplicity
{}
_end 1"""


@pytest.mark.parametrize(
    ("rows", "states", "kept"),
    [
        (["Na+1 Na+ 4", "O2-2 O2- 4"], {"Na": 1, "O": -2}, ["  Na1  Na  4", "  O2  O  4"]),
        (["Fe1 Fe+3 1", "Fe2 'Fe2+' 3"], {"Fe": 2.25}, ["  Fe1  Fe  1", "  Fe2  Fe  3"]),
        (["Fe1 Fe3+ 1", "Fe2 Fe 3"], {}, ["  Fe1  Fe  1", "Fe2 Fe 3"]),
        (["Fe1 Fe..+ 1"], {}, ["  Fe1  Fe  1"]),
        (["Fe1 Fe3+ ?"], {"Fe": 3}, ["  Fe1  Fe  ?"]),
        (["Fe1 Fe3+"], {}, ["Fe1 Fe3+"]),
        (["? ? ?"], {}, ["? ? ?"]),
    ],
)
def test_charged_site_symbols(rows, states, kept):
    found = take_oxidation_states(SITES.format("\n".join(rows)))
    assert found.states == states
    assert found.text == SITES.format("\n".join(kept))


@pytest.mark.parametrize(
    ("types", "states"),
    [
        (["Fe 3"], {"Fe": 3}),
        (["Fe3+ 3.0"], {"Fe": 3}),
        (["Fe3+ +3", "Fe2+ 2"], {}),
        (["Fe ?"], {}),
        (["O -2"], {}),
    ],
)
def test_bare_sites_of_stated_types(types, states):
    loop = ["loop_", "_atom_type_symbol", "_atom_type_oxidation_number", *types]
    sites = ["loop_", "_atom_site_label", "Fe1"]
    found = take_oxidation_states("\n".join([*loop, *sites]))
    assert found.states == states
    assert found.text == "\n".join(sites)


def test_a_text_of_states_can_be_prepared_again():
    once = preprocess_cif(symmetrized_cif(spinel()), oxidation_states={"Fe": 2.5, "O": -2})
    assert preprocess_cif(once, oxidation_states=True) == once


def test_printing():
    assert [printed_state(state) for state in (1, -2.0, 8 / 3, -0.0, 2.33335)] == [
        "1.0",
        "-2.0",
        "2.6667",
        "0.0",
        "2.3333",
    ]
    assert printed_radius("O", -2.0) == "1.2600"
    # No radius in the table, and not a whole state: the average.
    assert printed_radius("H", -1.0) == printed_radius("H", 0.5)


TEXT = written(salt("Na+", "Cl-"))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200) | st.tuples(st.integers(0, len(TEXT)), st.integers(0, 40), st.text(max_size=9)))
def test_broken_texts_raise_nothing_else(broken):
    if isinstance(broken, tuple):
        place, length, new = broken
        broken = TEXT[:place] + new + TEXT[place + length :]
    try:
        assert isinstance(preprocess_cif(broken, oxidation_states=True), str)
    except CIFError as error:
        assert not re.search(r"\n", str(error))  # noqa: PT017 - any outcome but another exception is right
