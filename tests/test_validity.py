"""The validator: published verdicts, every field, and text that was made to break it."""

import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.core.operations import SymmOp

from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import bond_length_score, expected_bond_length, parse_structure, validate
from crystallm_jax.evaluation.bonds import symmetry_orbits
from crystallm_jax.evaluation.parsing import build_structure, parse_blocks

FIELDS = {
    "formula_consistent": "is_formula_consistent",
    "multiplicity_consistent": "is_atom_site_multiplicity_consistent",
    "bond_length_score": "bond_length_reasonableness_score",
    "space_group_consistent": "is_space_group_consistent",
    "sensible": "is_sensible",
}
# Cut in the middle of a row of the site loop. The old parser dropped the rows that did not fill the loop and
# judged the rest (never valid: the multiplicities miss a row); today's refuses the text. Both say not valid.
CUT_IN_A_ROW = {"v087", "v092", "v100", "v137", "v183"}
RESOURCES = ("Timeout", "MemoryError")


@pytest.fixture(scope="module")
def rock_salt(fixtures):
    return (fixtures / "validity" / "rock_salt.cif").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rutile(fixtures):
    return (fixtures / "validity" / "rutile.cif").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def records(golden):
    with gzip.open(golden / "validity.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def reports(records):
    return {record["id"]: validate(record["post_text"]) for record in records}


def _plain(value):
    """A recorded value, None for an exception; a limit of the recording compares with nothing."""
    if isinstance(value, dict):
        return ... if value["error"] in RESOURCES else None
    return value


def test_verdicts_equal_the_published_ones(records, reports):
    for record in records:
        published = _plain(record["is_valid"])
        if published is not ...:
            assert reports[record["id"]].valid == (published is True), record["id"]


def test_fields_equal_the_published_ones(records, reports):
    different = set()
    for record in records:
        report = reports[record["id"]]
        for ours, theirs in FIELDS.items():
            published = _plain(record[theirs])
            if published is ... or getattr(report, ours) == pytest.approx(published, abs=1e-12):
                continue
            different.add(record["id"])
    assert different == CUT_IN_A_ROW


def test_fields_of_cut_rows_equal_those_of_a_modern_parser(records, reports):
    for record in records:
        if record["id"] in CUT_IN_A_ROW:
            assert record["mutation"] == "truncated_at_token"
            assert reports[record["id"]].reasons == ("unparsable",)
            for ours, theirs in FIELDS.items():
                assert getattr(reports[record["id"]], ours) == _plain(record["modern"][theirs])


def test_raw_output_is_judged_as_its_post_processed_text(records, reports):
    for record in records[:40]:
        assert validate(record["raw_text"]) == reports[record["id"]], record["id"]


@pytest.mark.parametrize("name", ["rock_salt.cif", "rock_salt_raw.txt", "rutile.cif", "rutile_raw.txt"])
def test_a_good_crystal_is_valid(fixtures, name):
    report = validate((fixtures / "validity" / name).read_text(encoding="utf-8"))
    assert report.valid
    assert report.bond_length_score == 1.0
    assert report.sensible
    assert report.error is None
    assert report.reasons == ()


def test_a_raw_text_with_wide_columns_is_post_processed(fixtures):
    raw = (fixtures / "validity" / "rutile_raw.txt").read_text(encoding="utf-8")
    assert validate(raw.replace("1 'x, y, z'", "1  'x, y, z'").replace("Ti ", "Ti   ")).valid


@pytest.mark.parametrize(
    ("old", "new", "reasons"),
    [
        ("data_Na4Cl4", "data_Na4Cl5", ("formula",)),
        ("'Na4 Cl4'", "'Na4 Cl8'", ("formula", "multiplicity")),
        ("Na0 4 ", "Na0 8 ", ("multiplicity",)),
        ("H-M Fm-3m", "H-M Im-3m", ("space_group",)),
        ("5.6402", "3.1402", ("bond_length",)),
        ("5.6402", "56.402", ("bond_length",)),
        ("Na0 4 0.0000", "Na0 4 0.00$0", ("unparsable",)),
        ("_chemical_formula_sum", "_chemical_formula_some", ("formula", "multiplicity")),
        ("_cell_length_b 5.6402", "_cell_length_b nan", ("unparsable",)),
    ],
)
def test_each_failure_has_its_reason(rock_salt, old, new, reasons):
    assert old in rock_salt
    report = validate(rock_salt.replace(old, new))
    assert report.reasons == reasons
    assert not report.valid


def test_an_error_is_one_line_and_names_the_element():
    report = validate(_cubic_cif("Xe", "F", length=2.6))
    assert report.error == "Xe has no atomic radius: bonds with it cannot be judged"
    assert report.bond_length_score is None
    assert report.reasons[0] == "bond_length"


@pytest.mark.parametrize(
    ("old", "new", "sensible"),
    [
        ("_cell_length_a 5.6402", "_cell_length_a 0.4999", False),
        ("_cell_length_a 5.6402", "_cell_length_a 0.5", True),
        ("_cell_length_a 5.6402", "_cell_length_a -5.6402", False),
        ("_cell_length_a 5.6402", "_cell_length_a inf", False),
        ("_cell_length_a 5.6402", "_cell_length_a 1.2.3", False),
        ("_cell_angle_beta 90.0000", "_cell_angle_beta 170.1", False),
        ("_cell_angle_beta 90.0000", "_cell_angle_beta 9", False),
        ("_cell_", "_no_", True),
    ],
)
def test_sensible_cells(rock_salt, old, new, sensible):
    assert old in rock_salt
    assert validate(rock_salt.replace(old, new)).sensible is sensible


def test_expected_bond_lengths():
    assert expected_bond_length("Ni", "Sn") == pytest.approx(1.35 + 1.45)
    assert expected_bond_length("Na", "Cl") == expected_bond_length("Cl", "Na")
    assert expected_bond_length("Na", "Cl") != pytest.approx(1.8 + 1.0)  # ionic radii
    with pytest.raises(CIFError, match="He has no atomic radius"):
        expected_bond_length("He", "H")
    with pytest.raises(CIFError, match="Po is not in the table"):
        expected_bond_length("Po", "O")


@pytest.mark.parametrize(("name", "orbits"), [("rock_salt", 2), ("rutile", 2)])
def test_orbits_give_the_score_of_the_plain_loop(fixtures, name, orbits):
    text = (fixtures / "validity" / f"{name}.cif").read_text(encoding="utf-8")
    for scale in (0.6, 1.0, 1.2):
        structure, operators = build_structure(parse_blocks(text))
        structure.scale_lattice(structure.volume * scale**3)
        assert len(set(symmetry_orbits(structure, operators).tolist())) == orbits
        assert bond_length_score(structure, operators) == bond_length_score(structure)


def test_golden_scores_are_those_of_the_plain_loop(records, reports):
    for record in records[:12]:
        if reports[record["id"]].bond_length_score is not None:
            structure = parse_structure(record["post_text"])
            assert bond_length_score(structure) == reports[record["id"]].bond_length_score


def test_orbits_use_only_true_symmetries():
    operators = [SymmOp.from_xyz_str(text) for text in ("x, y, z", "y, x, z", "-x, -y, -z", "x+1/2, y, z")]
    structure = Structure(
        Lattice.cubic(4), ["Na", "Na", "Cl"], [[0.1, 0.2, 0.3], [0.2, 0.1, 0.3], [0.5, 0.5, 0.3]]
    )
    assert symmetry_orbits(structure, operators).tolist() == [0, 0, 2]
    strained = Structure(Lattice.tetragonal(4, 5), structure.species, structure.frac_coords)
    assert symmetry_orbits(strained, operators).tolist() == [0, 0, 2]
    strained = Structure(Lattice.orthorhombic(4, 5, 6), structure.species, structure.frac_coords)
    assert symmetry_orbits(strained, operators).tolist() == [0, 1, 2]
    displaced = Structure(
        structure.lattice, structure.species, structure.frac_coords + np.eye(3)[:, :1] * [1e-5, 0, 0]
    )
    assert symmetry_orbits(displaced, operators).tolist() == [0, 1, 2]
    assert symmetry_orbits(structure, ()).tolist() == [0, 1, 2]


def test_a_deadline_ends_the_bond_score(rutile):
    report = validate(rutile, time_limit=0)
    assert report.reasons == ("timeout",)
    assert report.formula_consistent
    assert report.multiplicity_consistent
    assert report.space_group_consistent
    assert report.bond_length_score is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * 1_000_001, "1,000,001 characters"),
        ("\n".join(f"data_{index}" for index in range(101)), "101 data blocks"),
    ],
)
def test_large_texts_are_refused(text, message):
    report = validate(text)
    assert report.reasons == ("too_large",)
    assert message in report.error


@pytest.mark.parametrize(
    ("rows", "message"), [(1_001, "1,001 sites"), (4_000, "4,000 sites"), (20_001, "20,001 images")]
)
def test_large_cells_are_refused_before_they_expand(rows, message):
    head = _cubic_cif("Na", "Cl").partition("Na Na0")[0]
    sites = "\n".join(
        f"Na Na{index} 1 {index % 32 / 32:.4f} {index // 32 % 32 / 32:.4f} {index // 1024 / 32:.4f} 1.0"
        for index in range(rows)
    )
    report = validate(head + sites)
    assert report.reasons[-1] == "too_large"
    assert message in report.error


def test_a_needle_of_a_cell_is_refused():
    text = _cubic_cif("Na", "Cl").replace("_cell_length_a 4.0", "_cell_length_a 900.0").replace("4.0", "0.6")
    report = validate(text)
    assert report.reasons[0] == "too_large"
    assert "atoms within" in report.error


HOSTILE = {
    "empty": "",
    "nul": "\0" * 1000,
    "surrogate": "data_\ud800\n_cell_length_a \udfff",
    "blank lines": "data_Na\n" + "\n \t" * 200_000,
    "quotes": "data_Na\n" + "'" * 900 + "\n" + ("'" * 900 + "\n") * 100,
    "spaces": "data_Na\n" + " " * 900_000,
    "semicolons": "data_Na\n" + ";\n" * 100_000,
    "loops": "data_Na\n" + "loop_\n_a\n" * 20_000,
    "raw marks": "data_Na\nloop_\n_atom_type_electronegativity\n" * 2_000,
    "parentheses": "data_Na\n_chemical_formula_sum '" + "(" * 400 + "Na" + ")" * 400 + "'\n",
    "bare loop": "data_Na\nloop_",
    "only a header": "data_",
    "powder": "data_powder_pattern\n",
    "magnetic": "data_Na\n_atom_site_moment_label Na\n_cell_modulation_dimension 1\n_atom_site_label Na\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_end_in_a_report(name):
    report = validate(HOSTILE[name], time_limit=10)
    assert not report.valid
    assert report.reasons
    assert "\n" not in report.error


@pytest.mark.parametrize(
    "value", ["9" * 900, "9" * 1_000_000, "1e400", "nan", "inf", "-inf", "0", "-5.6402", "1e-300", "?"]
)
@pytest.mark.parametrize("place", ["_cell_length_a ", "_cell_angle_gamma ", "Na Na0 4 ", "Cl Cl1 "])
def test_hostile_numbers_end_in_a_report(rock_salt, place, value):
    text = re.sub(rf"({re.escape(place)})\S+", lambda found: found[1] + value, rock_salt)
    assert text != rock_salt
    report = validate(text, time_limit=10)
    assert isinstance(report.reasons, tuple)
    assert report.valid == (not report.reasons)


def test_something_else_than_text_is_no_cif():
    assert validate(None).reasons == ("unparsable",)
    assert validate(b"data_Na4Cl4\n").reasons == ("unparsable",)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_texts_end_in_a_report(rutile, data):
    text = rutile[: data.draw(st.integers(0, len(rutile)), label="cut")]
    pieces = st.sampled_from(
        ["\0", "'", '"', ";", "\nloop_\n", "\ndata_", "_", " ", "9999999", "-", ".", "nan", "é", "("]
    )
    for _ in range(data.draw(st.integers(0, 4), label="edits")):
        start = data.draw(st.integers(0, len(text)))
        removed = data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(pieces | st.text(max_size=5)) + text[start + removed :]
    report = validate(text, time_limit=20)
    assert report.valid == (not report.reasons)
    assert report.error is None or "\n" not in report.error


def test_parse_structure_raises_one_kind_of_error(rock_salt):
    assert len(parse_structure(rock_salt)) == 8
    for text in ("", "data_Na\nloop_", rock_salt.replace("0.0000 0.0000", "0.0000 x")):
        with pytest.raises(CIFError):
            parse_structure(text)


def _cubic_cif(first, second, *, length=4.0):
    """Two elements in a cubic cell, without symmetry."""
    return f"""data_{first}1{second}1
_symmetry_space_group_name_H-M P1
_cell_length_a {length}
_cell_length_b {length}
_cell_length_c {length}
_cell_angle_alpha 90.0
_cell_angle_beta 90.0
_cell_angle_gamma 90.0
_chemical_formula_structural {first}{second}
_chemical_formula_sum '{first}1 {second}1'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{first} {first}0 1 0.0000 0.0000 0.0000 1.0
{second} {second}1 1 0.5000 0.5000 0.5000 1.0
"""
