"""Prompts: the published text and ids, whatever order a composition is written in, and what is refused."""

import gzip
import json
import re

import pytest

from crystallm_jax.cif import (
    SPACEGROUPS,
    UNCONDITIONAL_PROMPT,
    CIFError,
    CIFTokenizer,
    find_spacegroup,
    make_prompt,
    prompt_from_cif,
)
from crystallm_jax.cif.formula import formula_order, parse_formula, reduced_formula

ROCKSALT = """data_Na4Cl4
loop_
_atom_type_symbol
_atom_type_electronegativity
_atom_type_radius
_atom_type_ionic_radius
Na  0.9300  1.8000  1.1600
Cl  3.1600  1.0000  0.7800
_symmetry_space_group_name_H-M   Fm-3m
"""


@pytest.mark.parametrize("composition", ["Na4Cl4", "Cl4Na4", " Cl4 Na4 ", "NaCl4Na3"])
def test_composition_in_any_order(composition):
    assert make_prompt(composition) == "data_Na4Cl4\n"


@pytest.mark.parametrize("spacegroup", ["Fm-3m", 225, "225", "F m -3 m"])
def test_spacegroup_by_symbol_or_number(spacegroup):
    assert make_prompt("Na4Cl4", spacegroup=spacegroup) == ROCKSALT


def test_unconditional_prompt():
    assert CIFTokenizer().tokenize_cif(UNCONDITIONAL_PROMPT) == ["data_"]


def test_count_of_one_is_written():
    assert make_prompt("LiFePO4") == "data_Li1Fe1P1O4\n"


def test_noble_gases():
    assert make_prompt("Si12O24He12") == "data_He12Si12O24\n"
    block = make_prompt("O24Si12He12", "R-3c").splitlines()[6:9]
    assert block == ["Si  1.9000  1.1000  0.5400", "O  3.4400  0.6000  1.2600", "He  4.16  1.4  0.0000"]
    assert formula_order(["He"]) == ["He"]
    assert formula_order(["Ar", "Al", "Na"]) == ["Ar", "Na", "Al"]


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("Na4Cl4x", "no formula from 'x' on"),
        ("na4", "no formula from 'na4' on"),
        ("Na(OH)2", r"no formula from '\(OH\)2' on"),
        ("Na4Clé", "no formula from 'é' on"),
        ("Na0.5Cl1", "count 0.5 of Na"),
        ("Na1.Cl", "count 1. of Na"),
        ("Na0Cl4", "has no Na"),
        ("Na9999999999", "over 9 digits"),
        ("Qq4", "'Qq' is not an element"),
        ("Nac4", "no formula from 'c4' on"),
        ("D2O", "isotope of hydrogen"),
        ("Po1", "element Po has no token"),
        ("At1", "element At has no token"),
        ("Rn1", "element Rn has no token"),
        ("Fr1", "element Fr has no token"),
        ("Ra1", "element Ra has no token"),
        ("Am1", "element Am has no token"),
    ],
)
def test_bad_compositions(composition, message):
    with pytest.raises(CIFError, match=message):
        make_prompt(composition)


@pytest.mark.parametrize("spacegroup", ["P6", "P432", "P4_222", 168, "207", 93, "P4222"])
def test_spacegroups_without_a_token_are_named(spacegroup):
    with pytest.raises(CIFError, match=r"space group P(6|432|4_222) \(number \d+\) has no token"):
        make_prompt("Na4Cl4", spacegroup)


@pytest.mark.parametrize(
    ("spacegroup", "message"),
    [
        ("Fm3m", "did you mean .*Fm-3m"),
        ("", "is unknown"),
        (0, "outside 1 to 230"),
        ("231", "outside 1 to 230"),
        (-3, "outside 1 to 230"),
        ("9" * 5000, "outside 1 to 230"),
        ("fm-3m", "unknown"),
    ],
)
def test_unknown_spacegroups(spacegroup, message):
    with pytest.raises(CIFError, match=message):
        make_prompt("Na4Cl4", spacegroup)


def test_other_spellings_of_spacegroups():
    assert find_spacegroup("P21/c") == find_spacegroup("P 2_1/c") == find_spacegroup(14) == "P2_1/c"
    assert find_spacegroup("Cmca") == "Cmce"
    assert [find_spacegroup(number) for number in SPACEGROUPS.values()] == list(SPACEGROUPS)


def test_reduced_formulas():
    cases = {
        "Ca4N8O24": ("Ca(NO3)2", 4),
        "La4Mn4O12": ("LaMnO3", 4),
        "O6": ("O2", 3),
        "Li2O2": ("Li2O2", 1),
        "He12Si12O24": ("HeSiO2", 12),
        "C8": ("C", 8),
    }
    for composition, expected in cases.items():
        assert reduced_formula(parse_formula(composition)) == expected


def test_prompts_from_a_preprocessed_text():
    text = ROCKSALT.replace("\n_atom", "\n _atom").replace("\nNa", "\n  Na") + "_cell_length_a   5.6400\n"
    assert prompt_from_cif(text) == "data_Na4Cl4\n"
    assert prompt_from_cif(text, with_spacegroup=True) == ROCKSALT
    with pytest.raises(CIFError, match="no data_ line"):
        prompt_from_cif("nothing")
    with pytest.raises(CIFError, match="no property block"):
        prompt_from_cif("data_Na4Cl4\n", with_spacegroup=True)


def test_golden_prompts(golden):
    tokenizer = CIFTokenizer()
    with gzip.open(golden / "prep.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            parts = re.findall(r"[A-Z][a-z]?\d+", record["prompt_comp"].removeprefix("data_"))
            assert prompt_from_cif(record["prep_cif"]) == record["prompt_comp"]
            assert prompt_from_cif(record["prep_cif"], with_spacegroup=True) == record["prompt_comp_sg"]
            for order in (parts, sorted(parts), parts[::-1]):
                assert make_prompt("".join(order)) == record["prompt_comp"], record["id"]
                for spacegroup in (record["space_group"], record["space_group_number"]):
                    prompt = make_prompt("".join(order), spacegroup)
                    assert prompt == record["prompt_comp_sg"], record["id"]
            ids = tokenizer.encode_cif(prompt).tolist()
            assert ids == record["token_ids"][: len(ids)], record["id"]
