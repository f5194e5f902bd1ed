"""Rows whose atoms are held to places and distances: untrained models write crystals, and batches change no sample."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from pymatgen.core import Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from pymatgen.symmetry.groups import SpaceGroup

import crystallm_jax as cl
from crystallm_jax.cif import make_prompt
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.errors import SamplingError
from crystallm_jax.model import ModelConfig
from crystallm_jax.sampling import returns
from crystallm_jax.sampling.constrain.atoms import atom_tables
from crystallm_jax.sampling.constrain.nodes import TOKEN_ID
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.requests import GenerationRequest
from crystallm_jax.sampling.returns import BUDGET, CELL, TRIES, History, go_back

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=640, vocab_size=371)
PROMPTS = [
    make_prompt("Na4Cl4"),
    make_prompt("Sr1Ti1O3", "Pm-3m"),
    make_prompt("Si8"),
    make_prompt("Mg2Si2", "P6_3/mmc"),
    "data_",
]


@pytest.fixture(scope="module")
def model() -> cl.CrystalModel:
    return cl.new_model(CONFIG, seed=1)


def _samples(
    model: cl.CrystalModel, prompts: Sequence[str] = PROMPTS, **settings: Any
) -> dict[tuple[int, int], cl.Sample]:
    request = GenerationRequest(method=SamplingMethod(top_k=None), seed=3, constrain="positions", **settings)
    batches = model.generate_batches(prompts, request)
    return {(row.prompt_index, row.sample_index): row for batch in batches for row in batch}


def test_an_untrained_model_writes_crystals_whose_atoms_have_room(model: cl.CrystalModel) -> None:
    samples = _samples(model, num_samples=4)
    assert len(samples) == 4 * len(PROMPTS)
    written = [sample for sample in samples.values() if sample.finished]
    assert len(written) > len(PROMPTS)
    for sample in written:
        assert not sample.unplaced
        _check(sample)
    for sample in samples.values():
        assert sample.finished or sample.unplaced or len(sample.token_ids) > CONFIG.block_size
    assert any(sample.returns > 0 for sample in written)


def _check(sample: cl.Sample) -> None:
    """By pymatgen alone: composition, a space group that contains the stated one, least distances."""
    with warnings.catch_warnings(action="ignore"):
        structure = Structure.from_str(sample.cif, fmt="cif")
        counts = parse_formula(sample.text.split("\n", 1)[0].removeprefix("data_"))
        assert structure.composition.get_el_amt_dict() == counts
        stated = sample.text.split("_symmetry_space_group_name_H-M ")[1].split("\n")[0]
        found = SpacegroupAnalyzer(structure, symprec=0.01).get_space_group_symbol()
    assert found == stated or SpaceGroup(stated).is_subgroup(SpaceGroup(found)) or _larger(found, stated)
    table = atom_tables().distances
    for i, site in enumerate(structure):
        for near in structure.get_neighbors(site, 3.5):
            other = near.specie.symbol
            least = table[TOKEN_ID[site.specie.symbol], TOKEN_ID[other]]
            assert near.nn_distance > least - 0.01, (i, other)


def _larger(found: str, stated: str) -> bool:
    """A group of more operations in the primitive cell may contain another in a setting that tables do not compare."""
    return _order(found) > _order(stated)


def _order(symbol: str) -> int:
    group = SpaceGroup(symbol)
    return len(group.symmetry_ops) // {"P": 1, "A": 2, "C": 2, "I": 2, "R": 3, "F": 4}[symbol[0]]


def test_the_batch_changes_no_sample(model: cl.CrystalModel) -> None:
    alone, together = (_samples(model, PROMPTS[1:4], batch_size=size) for size in (1, 16))
    for name, sample in alone.items():
        other = together[name]
        assert (sample.token_ids, sample.returns, sample.unplaced) == (
            other.token_ids,
            other.returns,
            other.unplaced,
        )


def test_what_finds_no_place_counts(model: cl.CrystalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "BUDGET", 1)
    samples = _samples(model, num_samples=3)
    unplaced = [sample for sample in samples.values() if sample.unplaced]
    assert unplaced
    assert all(sample.returns == 1 and not sample.finished for sample in unplaced)


def test_a_part_that_fails_is_drawn_anew_then_with_more_and_more_before_it() -> None:
    history, targets = History(), []
    for _ in range(4 * TRIES):
        history, target = go_back(history, 6)
        targets.append(target)
    assert targets[: TRIES - 1] == [6] * (TRIES - 1)
    assert targets[TRIES - 1] == 5
    assert set(targets) == {6, 5, 4, 2, CELL}
    history, target = go_back(history, CELL)
    assert target == CELL
    assert history.tries == {}
    assert history.returns == 4 * TRIES + 1


def test_a_row_is_given_up_in_the_end() -> None:
    history = History()
    for _ in range(BUDGET):
        history, target = go_back(history, 1)
        assert target in (CELL, 1)
    assert go_back(history, 1) == (history, None)


def test_a_cell_of_more_sites_than_are_looked_at_is_refused(model: cl.CrystalModel) -> None:
    with pytest.raises(SamplingError, match="takes 64 sites in P1: level positions looks at 63 at most"):
        model.generate([make_prompt("Na64", "P1")], constrain="positions", max_new_tokens=4000)
