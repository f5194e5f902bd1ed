import re

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, make_prompt
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.cif.occupations import compatible_spacegroups
from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.constrain import Automaton, RowPlan

TOKENIZER = CIFTokenizer()


def _plan(level: str, prompt: str, limit: int = 1024) -> RowPlan:
    return Automaton(level).plan(TOKENIZER.encode_cif(prompt), limit=limit)


def _groups(plan: RowPlan) -> set[str]:
    words = np.asarray(plan.state.groups)
    return {TOKENIZER.id_to_token[i] for i in range(371) if (words[i // 32] >> (i % 32)) & 1}


def test_a_composition_forces_the_text_up_to_the_space_group() -> None:
    forced = TOKENIZER.decode(_plan("composition", "data_Na4Cl4\n").forced)
    prompt = re.sub(" +", " ", make_prompt("Na4Cl4", "Fm-3m"))
    assert f"data_Na4Cl4\n{forced}Fm-3m\n" == prompt
    assert TOKENIZER.decode(_plan("symmetry", "data_Na4Cl4\n").forced) == forced


def test_the_level_syntax_forces_no_more_than_what_all_files_have() -> None:
    forced = TOKENIZER.decode(_plan("syntax", "data_Na4Cl4\n").forced)
    assert forced.startswith("loop_\n_atom_type_symbol\n")
    assert forced.endswith("_atom_type_ionic_radius\n")


def test_the_line_of_the_space_group_may_be_ended_or_not() -> None:
    ids = TOKENIZER.encode_cif(make_prompt("Na4Cl4", "Fm-3m"))
    automaton = Automaton("symmetry")
    assert TOKENIZER.decode(automaton.plan(ids, limit=1024).forced) == "_cell_length_a "
    assert TOKENIZER.decode(automaton.plan(ids[:-1], limit=1024).forced) == "\n_cell_length_a "


@pytest.mark.parametrize("level", ["composition", "symmetry"])
def test_a_property_block_of_other_elements_is_refused(level: str) -> None:
    prompt = make_prompt("Na4Cl4", "Fm-3m")
    with pytest.raises(SamplingError, match="properties of Na, Br, not of Na4Cl4"):
        _plan(level, prompt.replace("Cl  3", "Br  3"))
    _plan("syntax", prompt.replace("Cl  3", "Br  3"))
    # A last column, as of oxidation states, is the prompt's own affair.
    with_states = prompt.replace("1.1600\n", "1.1600 1\n").replace(
        "ionic_radius\n", "ionic_radius\n_atom_type_oxidation_number\n"
    )
    assert TOKENIZER.decode(_plan(level, with_states).forced) == "_cell_length_a "


def test_the_groups_that_may_be_drawn_are_those_that_hold_the_composition() -> None:
    counts = parse_formula("Na4Cl4")
    assert _groups(_plan("symmetry", "data_Na4Cl4\n")) == set(compatible_spacegroups(counts))
    assert len(_groups(_plan("composition", "data_Na4Cl4\n"))) == 227


def test_groups_whose_files_are_too_long_are_not_drawn() -> None:
    # Each atom of C60 is a row of its own in P1.
    assert "P1" in compatible_spacegroups({"C": 60})
    assert "P1" not in _groups(_plan("symmetry", "data_C60\n"))


def test_plans_are_made_once_and_cannot_be_changed() -> None:
    first, again = _plan("symmetry", "data_Na4Cl4\n"), _plan("symmetry", "data_Na4Cl4\n")
    assert first is again
    with pytest.raises(ValueError, match="read-only"):
        first.forced[0] = 0


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "must be 'data_'"),
        ("data_Na4Cl4", "must be 'data_'"),
        ("_cell_length_a 5", "must be 'data_'"),
        ("data_Na4Cl4\n_cell_length_a ", "must be 'data_'"),
        ("data_Na4\nloop_\n", "must be 'data_'"),
        ("data_Na0\n", "has no Na"),
    ],
)
@pytest.mark.parametrize("level", ["syntax", "composition", "symmetry"])
def test_what_is_no_beginning_of_a_file_is_refused(level: str, prompt: str, reason: str) -> None:
    with pytest.raises(SamplingError, match=reason) as refused:
        _plan(level, prompt)
    assert "\n" not in str(refused.value)


def test_a_space_group_that_cannot_hold_the_composition_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"Fm-3m cannot hold Sr1Ti1O3.*Pm-3m"):
        _plan("symmetry", make_prompt("Sr1Ti1O3", "Fm-3m"))
    _plan("composition", make_prompt("Sr1Ti1O3", "Fm-3m"))


@pytest.mark.parametrize("level", ["syntax", "composition", "symmetry"])
@pytest.mark.parametrize("prompt", ["data_", "data_Na4Cl4\n", make_prompt("Na4Cl4", "Fm-3m")])
def test_a_limit_that_no_file_fits_is_refused_with_the_least(level: str, prompt: str) -> None:
    with pytest.raises(SamplingError, match="a limit of 100 tokens is too small") as refused:
        _plan(level, prompt, 100)
    least = int(str(refused.value).split("takes ")[1].split(",")[0])
    _plan(level, prompt, least)
    with pytest.raises(SamplingError, match="too small"):
        _plan(level, prompt, least - 1)


def test_compositions_beyond_the_registers_are_refused() -> None:
    elements = "".join(f"{symbol}1" for symbol in list(TOKENIZER.token_to_id)[:13])
    with pytest.raises(SamplingError, match="13 elements: at most 12"):
        _plan("composition", f"data_{elements}\n")
    with pytest.raises(SamplingError, match="too large for level symmetry"):
        _plan("symmetry", make_prompt("Na40000", "P-1"), 100_000)


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(SamplingError, match="constrain='full': must be one of syntax, composition, symmetry"):
        Automaton("full")  # type: ignore[arg-type]
