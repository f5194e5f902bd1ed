"""Prompts: the published text and ids, whatever order a composition is written in, and what is refused."""

import gzip
import json
import re
from pathlib import Path

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
from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.prompts import (
    COMPATIBLE,
    Prompt,
    composition_prompt,
    composition_prompts,
    excluded_ids,
    formula_prompts,
    unconditional_prompt,
    unfitting,
    unique_ids,
    wanted_spacegroups,
    within_sites,
    without_elements,
)

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


def test_a_composition_makes_the_prompt_of_make_prompt() -> None:
    assert composition_prompt("Cl4Na4") == Prompt("Na4Cl4", make_prompt("Na4Cl4"))
    assert composition_prompt("Na4Cl4", "225") == Prompt("Na4Cl4_225", make_prompt("Na4Cl4", "Fm-3m"))
    assert unconditional_prompt().text == UNCONDITIONAL_PROMPT


def test_a_formula_is_asked_for_at_each_number_of_units() -> None:
    prompts = formula_prompts("TiO2", (2, 4), "P4_2/mnm")
    assert [prompt.text for prompt in prompts] == [make_prompt(c, "P4_2/mnm") for c in ("Ti2O4", "Ti4O8")]
    assert [prompt.id for prompt in prompts] == ["Ti2O4_P4_2/mnm", "Ti4O8_P4_2/mnm"]


@pytest.mark.parametrize("z", [(), (0,), (2, -1)])
def test_numbers_of_units_start_at_one(z: tuple[int, ...]) -> None:
    with pytest.raises(SamplingError, match="start at 1"):
        formula_prompts("NaCl", z)


def test_bad_compositions_keep_their_own_error() -> None:
    with pytest.raises(CIFError, match="is not an element"):
        composition_prompt("Qq4")


def test_names_fit_files_on_every_system() -> None:
    prompts = [
        Prompt(name, "data_") for name in ("a/b", "../up", "c:\\d e", "...", "é", "", "P4_2/mnm", "+x-1")
    ]
    names = [prompt.id for prompt in unique_ids(prompts)]
    assert names == ["a-b", "-up", "c--d-e", "prompt", "-", "prompt-2", "P4_2-mnm", "+x-1"]


def test_names_are_unlike_each_other_in_any_case() -> None:
    given = ["salt", "Salt", "salt", "SALT-2", "salt-2", "a/b", "a-b"]
    renamed = unique_ids([Prompt(name, f"data_{i}") for i, name in enumerate(given)])
    names = [prompt.id for prompt in renamed]
    assert len({name.lower() for name in names}) == len(given)
    assert names[0] == "salt"
    assert [prompt.text for prompt in renamed] == [f"data_{i}" for i in range(len(given))]


def test_long_names_still_fit_a_file_name(tmp_path: Path) -> None:
    long = "x" * 300
    prompts = unique_ids([Prompt(long, "data_"), Prompt(long, "data_"), Prompt(long + "y", "data_")])
    assert len({prompt.id for prompt in prompts}) == 3
    for prompt in prompts:
        (tmp_path / f"{prompt.id}__1000000.cif.partial").write_text("")


def test_several_space_groups_make_several_prompts() -> None:
    prompts = composition_prompts("Na4Cl4", "225, P1,P 21/c")
    assert [prompt.id for prompt in prompts] == ["Na4Cl4_225", "Na4Cl4_P1", "Na4Cl4_P 21/c"]
    assert prompts[2].text == make_prompt("Na4Cl4", "P2_1/c")
    with pytest.raises(SamplingError, match="space groups 225,Fm-3m: one of them stands there twice"):
        composition_prompts("Na4Cl4", "225,Fm-3m")
    with pytest.raises(CIFError, match=r"P6 .* has no token"):
        composition_prompts("Na4Cl4", "225,P6")


def test_compatible_space_groups_are_those_that_can_hold_the_cell() -> None:
    groups = wanted_spacegroups({"Na": 1, "Cl": 1}, COMPATIBLE)
    assert groups[:2] == ["P1", "P-1"]
    assert "Pm-3m" in groups
    assert not {"Fm-3m", "P2_1/c"}.intersection(groups)
    # Two sites of multiplicity 1 without parameters, and three atoms.
    assert "Pm-3m" not in wanted_spacegroups({"Na": 1, "Cl": 1, "Br": 1}, COMPATIBLE)
    assert "Fm-3m" in wanted_spacegroups({"Na": 4, "Cl": 4}, COMPATIBLE)


def test_prompts_with_excluded_elements_are_left_out() -> None:
    prompts = [composition_prompt(c) for c in ("Pb1O1", "Na4Cl4", "Cd1S1")]
    prompts += [Prompt("open", "data_Pb1"), unconditional_prompt()]
    assert [prompt.id for prompt in without_elements(prompts, ("Pb", "Cd"))] == ["Na4Cl4", "unconditional"]
    with pytest.raises(SamplingError, match="excluded elements Pb: each of the 1 prompts has one"):
        without_elements(prompts[:1], ("Pb",))


def test_excluded_elements_are_tokens() -> None:
    tokenizer = CIFTokenizer()
    assert [tokenizer.id_to_token[i] for i in excluded_ids(("Pb", "C"))] == ["Pb", "C"]
    assert excluded_ids(()) == ()
    with pytest.raises(CIFError, match="has no token"):
        excluded_ids(("Po",))


def test_large_cells_are_left_out() -> None:
    prompts = formula_prompts("NaCl", (1, 2, 4))
    assert within_sites(prompts, 4) == prompts[:2]
    with pytest.raises(SamplingError, match="at most 1 sites: the smallest cell asked for has 2 atoms"):
        within_sites(prompts, 1)
    with pytest.raises(SamplingError, match="cannot be honoured for the prompt 'unconditional'"):
        within_sites([*prompts, unconditional_prompt()], 4)


def test_new_names_keep_the_numbers_of_samples() -> None:
    assert unique_ids([Prompt("a", "data_", 3), Prompt("A", "data_")]) == [
        Prompt("a", "data_", 3),
        Prompt("A-2", "data_"),
    ]


def test_a_space_group_that_cannot_hold_the_cell_is_found() -> None:
    prompts = [
        composition_prompt("Na1Cl3", "Fm-3m"),
        composition_prompt("Na4Cl4", "Fm-3m"),
        composition_prompt("Na1Cl3"),
        unconditional_prompt(),
    ]
    assert unfitting(prompts) == prompts[:1]
