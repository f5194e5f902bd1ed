"""Broken texts: what once made a reader stumble or never end, and some hundred fresh ones.

`tools/fuzz_cif.py` makes as many as wanted, each in a process that may die; here are none that could.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from crystallm_jax.data.reading.guards import MAX_CHARACTERS
from crystallm_jax.data.reading.structures import parse_structure
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import parse_structure as parse_for_judgement

TOOLS = Path(__file__).resolve().parents[1] / "tools"
FINDS = sorted((Path(__file__).parent / "fixtures" / "fuzz").glob("*.cif"))
# What each is refused with; the others are read.
REASONS = {
    "cell_angles_impossible": "Singular matrix",
    "cell_before_its_block": "it has no '_cell_length_a'",
    "cell_flat": r"repeats after 0.049 Å",
    "cell_missing": "it has no '_cell_length_a'",
    "cell_not_a_number": "has no volume",
    "cell_setting_that_is_none": "TypeError",
    "cell_setting_without_lengths": "TypeError",
    "cell_settings_in_a_loop": "AttributeError",
    "column_missing": "it has no '_atom_site_fract_z'",
    "coordinate_infinite": "cannot convert float NaN",
    "coordinate_not_a_number": "cannot convert float NaN",
    "operators_long_without_sites": "a symmetry operator has 408 characters",
    "label_not_ascii": "values left over",
    "loop_with_a_field_too_many": "values left over",
    "loop_without_columns": "no tags, or no values",
    "loop_without_rows": "no tags, or no values",
    "magnetic_and_disordered": "NotImplementedError",
    "magnetic_name_unknown": "TypeError",
    "magnetic_numbers_in_a_loop": "AttributeError",
    "magnetic_transformation_with_powers": "has a power in it",
    "name_empty_then_loop": "no tags, or no values",
    "only_a_name": "it has no '_atom_site_label'",
    "operator_of_thousands_of_digits": "operator has 1,508 characters",
    "operator_over_zero": "ZeroDivisionError",
    "operator_with_four_parts": "IndexError",
    "oxidation_not_a_number": "OverflowError",
    "plain_coordinate_beyond_floats": "cannot convert float NaN",
    "plain_loop_that_is_empty": "no tags, or no values",
    "quotes_by_the_thousand": "and many quotes",
    "site_of_water": "hydrogens are implied",
    "site_symbol_empty": "names no element",
    "site_without_element": r"'\?' names no element",
    "sites_outside_a_loop": "outside a loop_",
    "zero_bytes": "it has no '_cell_length_a'",
}


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    _tool("cif_mutations")
    return _tool("fuzz_cif")


def _text(path: Path) -> str:
    return path.read_bytes().decode()


@pytest.mark.parametrize("path", FINDS, ids=[path.stem for path in FINDS])
@pytest.mark.timeout(20)
def test_what_was_found_once_is_answered(fuzz: ModuleType, path: Path) -> None:
    text = _text(path)
    assert fuzz.check(text) == []
    if path.stem in REASONS:
        with pytest.raises(CIFError, match=REASONS[path.stem]):
            parse_structure(text)
    else:
        assert parse_structure(text).composition.formula == "Na1 Cl1"


def test_each_reason_has_its_text() -> None:
    assert REASONS.keys() <= {path.stem for path in FINDS}
    assert len(FINDS) > len(REASONS)


def test_fresh_texts_are_answered(fuzz: ModuleType) -> None:
    seeds = [text for text in fuzz.seed_texts() if len(text) < 4_000]
    assert len(seeds) > 100
    for number in range(300):
        text = fuzz.mutated(seeds, 20_230_610, number)
        finds = fuzz.check(text, patience=0.02)
        assert finds == [], f"{finds}\n{text}"


def test_a_campaign_is_the_same_each_time(fuzz: ModuleType) -> None:
    seeds = fuzz.seed_texts()[:20]
    texts = [fuzz.mutated(seeds, 1, number) for number in range(40)]
    assert texts == [fuzz.mutated(seeds, 1, number) for number in range(40)]
    assert len(set(texts)) > 30
    assert texts != [fuzz.mutated(seeds, 2, number) for number in range(40)]


def test_finds_are_noticed_and_cut_down(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(text: str) -> str:
        if "needle" in text:
            raise KeyError(text)
        raise CIFError("two\nlines")

    monkeypatch.setattr(fuzz, "stream_text", fragile)
    hay = "\n".join(["hay"] * 20)
    found = fuzz.check(f"{hay}\na needle or two\n{hay}")
    assert [find[:2] for find in found] == [("stream_text", "KeyError")]
    assert fuzz.cut_down(f"{hay}\na needle or two\n{hay}", found[0]) == "needle"
    assert [find[:2] for find in fuzz.check(hay)] == [("stream_text", "message")]


def test_texts_beyond_all_bounds_are_refused_at_once() -> None:
    with pytest.raises(CIFError, match="at most 10,000,000 are read"):
        parse_structure("a\n" * MAX_CHARACTERS)
    site = "Na Na1 0.1 0.2 0.3"
    base = _text(next(path for path in FINDS if path.stem == "digits_not_ascii"))
    assert "Na Na1 0 0 0" in base
    many = base.replace("Na Na1 0 0 0", "\n".join([site] * 300))
    operators = "\n".join(f"'x+{i}/997, y, z'" for i in range(1, 300))
    loop = f"loop_\n_symmetry_equiv_pos_as_xyz\n{operators}\nloop_\n"
    with pytest.raises(CIFError, match="have 89,999 images"):
        parse_structure(many.replace("loop_\n", loop, 1))
    few = base.replace("Na Na1 0 0 0", "\n".join(f"Na Na{i} 0 0.00{i} 0" for i in range(10, 50)))
    with pytest.raises(CIFError, match=r"the cell has \d\d,\d{3} atoms"):
        parse_structure(few.replace("loop_\n", loop, 1))


def test_both_readers_refuse_a_cell_that_repeats_at_once() -> None:
    text = _text(next(path for path in FINDS if path.stem == "cell_flat"))
    for read in (parse_structure, parse_for_judgement):
        with pytest.raises(CIFError, match="closer than atoms are"):
            read(text)
