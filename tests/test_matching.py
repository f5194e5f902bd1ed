"""Matches of generated and true structures."""

import gzip
import json

import pytest
from pymatgen.core import Structure

from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import match, parse_structure


@pytest.fixture(scope="module")
def texts(fixtures):
    return {path.stem: path.read_text(encoding="utf-8") for path in (fixtures / "validity").iterdir()}


def test_matches_equal_the_published_ones(golden):
    with gzip.open(golden / "match.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for record in records:
        published = record["rms_dist_ignoring_validity"]
        if record["is_sensible"] is False:
            published = None  # such a text never reaches the matcher
        found = match(record["pred_cif"], record["true_cif"])
        assert (found is None) == (published is None), record["id"]
        if found is not None:
            assert found == pytest.approx(published, abs=1e-5), record["id"]


@pytest.mark.parametrize("name", ["rock_salt", "rutile"])
def test_a_structure_matches_itself_in_every_form(texts, name):
    text = texts[name]
    structure = parse_structure(text)
    for generated in (
        text,
        texts[f"{name}_raw"],
        structure,
        structure.get_primitive_structure(),
        structure * (2, 1, 1),
    ):
        for true in (text, texts[f"{name}_raw"], structure):
            assert match(generated, true) == pytest.approx(0.0, abs=1e-5)


def test_different_structures_do_not_match(texts):
    assert match(texts["rock_salt"], texts["rutile"]) is None


def test_the_distance_grows_with_the_displacement(texts):
    structure = parse_structure(texts["rutile"])
    distances = []
    for size in (0.01, 0.02, 0.04):
        moved = structure.copy()
        moved.translate_sites([2], [size, 0, 0])
        distances.append(match(moved, structure))
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[2] < 0.5
    assert match(moved, structure, stol=1e-4) is None


def test_a_generated_text_that_cannot_be_used_matches_nothing(texts):
    true = texts["rock_salt"]
    assert match("", true) is None
    assert match("data_Na\nloop_", true) is None
    assert match(true.replace("_cell_length_a 5.6402", "_cell_length_a 1000.1"), true) is None
    assert match(true.replace("_cell_angle_alpha 90.0000", "_cell_angle_alpha 171.0"), true) is None
    assert match("x" * 2_000_000, true) is None


def test_a_generated_structure_whose_cell_is_not_sensible_matches_nothing():
    long = Structure([[1001, 0, 0], [0, 4, 0], [0, 0, 4]], ["Na"], [[0, 0, 0]])
    assert match(long, long) is None


def test_a_true_text_that_does_not_parse_is_an_error(texts):
    for true in ("", "data_Na\nloop_", texts["rock_salt"].replace("Na0 4 0.0000", "Na0 4 x")):
        with pytest.raises(CIFError):
            match(texts["rock_salt"], true)
