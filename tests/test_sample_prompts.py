"""The flags that name prompts: what they make, what is left out and said, what is refused."""

import argparse
import logging
from pathlib import Path

import pytest

from crystallm_jax.cif import make_prompt
from crystallm_jax.cli.flags.prompts import add_prompt_flags
from crystallm_jax.cli.sample_prompts import prompts_from
from crystallm_jax.errors import CIFError, ConfigError, CrystallmError, SamplingError
from crystallm_jax.sampling.prompts import Prompt


def _prompts(*flags: str) -> list[Prompt]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default")
    add_prompt_flags(parser)
    return prompts_from(parser.parse_args(flags), block_size=lambda: 1024)


def _ids(*flags: str) -> list[str]:
    return [prompt.id for prompt in _prompts(*flags)]


def test_each_source_makes_its_prompts(tmp_path: Path) -> None:
    assert _prompts("--composition", "Na4Cl4") == [Prompt("Na4Cl4", make_prompt("Na4Cl4"))]
    assert _ids("--formula", "TiO2") == ["Ti1O2", "Ti2O4", "Ti3O6", "Ti4O8"]
    assert _ids("--formula", "TiO2", "--z", "2, 4") == ["Ti2O4", "Ti4O8"]
    assert _ids("--unconditional") == ["unconditional"]
    assert _ids("--elements", "Al-O", "--z", "2") == ["Al4O6"]
    path = tmp_path / "p.csv"
    path.write_text("composition,n\nNa4Cl4,7\n")
    assert _prompts("--prompts", str(path)) == [Prompt("Na4Cl4", make_prompt("Na4Cl4"), 7)]


def test_units_that_fit_the_context() -> None:
    assert len(_ids("--formula", "NaCl", "--z", "fit")) == 50
    assert len(_ids("--formula", "NaCl", "--z", "fit", "--max-sites", "12")) == 6
    with pytest.raises(
        SamplingError, match="--z fit: no cell of NaCl in space group 225 with at most 6 atoms"
    ):
        _prompts("--formula", "NaCl", "--z", "fit", "--max-sites", "6", "--spacegroup", "225")


def test_the_model_says_how_long_its_context_is() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default")
    add_prompt_flags(parser)
    arguments = parser.parse_args(["--formula", "NaCl", "--z", "fit", "--max-sites", "4"])
    assert [prompt.id for prompt in prompts_from(arguments)] == ["Na1Cl1", "Na2Cl2"]


def test_space_groups_by_list_or_all_that_are_compatible() -> None:
    assert _ids("--composition", "Na4Cl4", "--spacegroup", "225,P1") == ["Na4Cl4_225", "Na4Cl4_P1"]
    both = _ids("--formula", "CsCl", "--z", "1,2", "--spacegroup", "compatible")
    assert {"Cs1Cl1_Pm-3m", "Cs2Cl2_P4/nmm"} <= set(both)
    assert "Cs1Cl1_P4/nmm" not in both


def test_a_system_says_how_many_formulas_it_has(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "crystallm_jax"):
        assert _ids("--elements", "Fe-O", "--max-formula-atoms", "5", "--z", "1,2") == [
            "Fe1O1",
            "Fe2O2",
            "Fe2O3",
            "Fe4O6",
        ]
    assert caplog.messages == ["Fe-O: 2 charge-balanced formulas of up to 5 atoms", "4 prompts"]
    assert "Li2O1" in _ids("--elements", "Li-Fe-O", "--subsystems", "--z", "1")


def test_formulas_of_a_system_that_no_cell_holds_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    flags = (
        "--elements",
        "Fe-O",
        "--max-formula-atoms",
        "5",
        "--z",
        "fit",
        "--spacegroup",
        "225",
        "--max-sites",
        "8",
    )
    with caplog.at_level(logging.INFO, "crystallm_jax"):
        assert _ids(*flags) == ["Fe4O4_225"]
    assert caplog.messages[1:] == ["left out 1 formulas no cell of which fits", "1 prompts"]


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Na4Cl4\nPb1O1\nCd1O1\nTi2O4\n")
    flags = ("--prompts", str(path), "--exclude-elements", "Pb, Cd", "--max-sites", "6")
    with caplog.at_level(logging.INFO, "crystallm_jax"):
        assert _ids(*flags) == ["Ti2O4"]
    assert caplog.messages == [
        "left out 2 prompts with excluded elements (Pb,Cd)",
        "left out 1 prompts of more than 6 sites",
    ]
    assert _ids("--prompts", str(path), "--limit", "2") == ["Na4Cl4", "Pb1O1"]
    assert _ids("--unconditional", "--exclude-elements", "Pb") == ["unconditional"]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            "--composition Na4Cl4 --z 2",
            ConfigError,
            "--z goes with --formula or --elements: a composition counts",
        ),
        (
            "--unconditional --spacegroup 225",
            ConfigError,
            "--spacegroup goes with --composition or --formula or",
        ),
        ("--prompts p.csv --spacegroup 225", ConfigError, "in a file it stands beside each"),
        ("--formula NaCl --with-spacegroup", ConfigError, "--with-spacegroup goes with --prompts"),
        ("--formula NaCl --subsystems", ConfigError, "--subsystems goes with --elements"),
        ("--formula NaCl --max-formula-atoms 4", ConfigError, "--max-formula-atoms goes with --elements"),
        ("--unconditional --max-sites 4", ConfigError, "--max-sites cannot be honoured with --unconditional"),
        (
            "--composition Pb1O1 --exclude-elements Pb",
            SamplingError,
            "excluded elements Pb: each of the 1 prompts",
        ),
        ("--composition Na4Cl4 --max-sites 4", SamplingError, "the smallest cell asked for has 8 atoms"),
        ("--composition Na4Cl4 --exclude-elements Po", CIFError, "element Po has no token"),
        ("--elements Fe-Al", SamplingError, "no element has a negative oxidation state"),
        ("--composition Qq4", CIFError, "'Qq' is not an element"),
        ("--composition Na4Cl4 --spacegroup 300", CIFError, "outside 1 to 230"),
        ("--formula NaCl --z 2,2", SamplingError, "one of them stands there twice"),
    ],
)
def test_conditions_that_cannot_be_honoured_are_refused(
    flags: str, error: type[CrystallmError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        _prompts(*flags.split())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        "--formula NaCl --z 0",
        "--formula NaCl --z 1,-2",
        "--formula NaCl --z all",
        "--formula NaCl --limit 0",
        "--formula NaCl --limit -1",
        "--formula NaCl --max-sites 0",
        "--elements Na-Cl --max-formula-atoms 1.5",
        "--composition Na4Cl4 --spacegroup 225,",
        "--composition Na4Cl4 --exclude-elements Pb;Cd",
        "--elements na-cl",
        "--composition Na4Cl4 --formula NaCl",
        "",
    ],
)
def test_bad_values_are_wrong_usage(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _prompts(*flags.split())
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err
