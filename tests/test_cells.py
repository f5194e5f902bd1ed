"""Cells whose text fits a context: no shorter text exists, and the search stops where it should."""

import re

import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.sampling.cells import fitting_prompts, shortest_length


def test_no_crystal_of_the_corpus_has_a_shorter_text() -> None:
    encode = CIFTokenizer().encode_cif
    slack = []
    for record in list(read_corpus())[::25]:
        text = stream_text(preprocess_cif(record.text))
        counts = parse_formula(re.match(r"data_(\S+)", text)[1])
        stated = shortest_length(counts, re.search(rf"{SPACEGROUP_TAG} +(\S+)", text)[1])
        assert shortest_length(counts) <= stated <= len(encode(text)), record.id
        slack.append(len(encode(text)) - stated)
    assert min(slack) < 6


def test_every_number_of_units_that_fits_is_asked_for() -> None:
    prompts = fitting_prompts("NaCl", block_size=1024, most_sites=20)
    assert [prompt.id for prompt in prompts] == [f"Na{n}Cl{n}" for n in range(1, 11)]


def test_a_space_group_leaves_the_cells_that_it_can_hold() -> None:
    prompts = fitting_prompts("MgAl2O4", "Fd-3m", block_size=1024, most_sites=60)
    assert [prompt.id for prompt in prompts] == ["Mg8Al16O32_Fd-3m"]
    assert shortest_length({"Mg": 1, "Al": 2, "O": 4}, "Fd-3m") is None
    groups = [prompt.id for prompt in fitting_prompts("CsCl", "compatible", block_size=1024, most_sites=4)]
    assert {"Cs1Cl1_Pm-3m", "Cs2Cl2_P4/nmm"} <= set(groups)
    assert "Cs1Cl1_P4/nmm" not in groups


@pytest.mark.parametrize(("block_size", "most_sites"), [(200, 100), (1024, 1)])
def test_nothing_fits_a_small_context_or_few_sites(block_size: int, most_sites: int) -> None:
    assert fitting_prompts("NaCl", block_size=block_size, most_sites=most_sites) == []
    assert fitting_prompts("NaCl", "P1", block_size=block_size, most_sites=most_sites) == []
