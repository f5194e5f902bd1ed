"""The embedded corpus: what ships, and that the script in `tools/` makes the same again."""

import csv
import importlib
import lzma
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from pymatgen.core import Composition, Species, Structure

from crystallm_jax.cif import SPACEGROUPS, CIFTokenizer, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.data.corpus import corpus_path, read_corpus

COUNT = 3000
MAX_TOKENS = 700
TOOLS = Path(__file__).resolve().parents[1] / "tools"
# Small and quick: two binary ones and a ternary one, one with split orbits, two with free coordinates.
REBUILT = ("AB_oP4_59_a_b", "AB_cP2_221_b_a", "ABC_tP6_129_c_a_c")

# pymatgen warns of ions without a radius and of rounded coordinates, spglib of its way to report errors.
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Entry(NamedTuple):
    id: str
    prototype: str
    charges: str
    cif: str
    stream: str

    @property
    def key(self) -> tuple[str, str]:
        """Cell formula and space group."""
        lines = self.stream.splitlines()
        tag = "_symmetry_space_group_name_H-M "
        return lines[0].removeprefix("data_"), next(x for x in lines if x.startswith(tag)).removeprefix(
            tag
        ).strip()


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    with lzma.open(corpus_path(), "rt", encoding="utf-8", newline="") as file:
        return [Entry(**row, stream=stream_text(preprocess_cif(row["cif"]))) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def make_corpus() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module("make_corpus")
    finally:
        sys.path.remove(str(TOOLS))


def test_the_shipped_file_is_small_and_whole(entries):
    assert corpus_path().stat().st_size < 2_000_000
    assert len(entries) == COUNT
    assert len({entry.id for entry in entries}) == COUNT
    assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)


def test_read_corpus_yields_every_row(entries):
    records = list(read_corpus())
    assert [(record.id, record.text) for record in records] == [(entry.id, entry.cif) for entry in entries]
    assert not any(record.problem for record in records)


def test_no_formula_comes_twice_in_a_space_group(entries):
    assert max(Counter(entry.key for entry in entries).values()) == 1


def test_charges_add_up_to_zero(entries):
    for entry in entries:
        ions = {ion.symbol: ion.oxi_state for ion in map(Species.from_str, entry.charges.split())}
        counts = Composition(entry.key[0])
        assert set(ions) == {element.symbol for element in counts}, entry.id
        assert sum(ions[element.symbol] * number for element, number in counts.items()) == 0, entry.id
        assert all(isinstance(charge, int) or charge.is_integer() for charge in ions.values()), entry.id


def test_every_text_is_short_and_in_the_vocabulary(entries):
    tokenizer = CIFTokenizer()
    unknown = tokenizer.token_to_id["<unk>"]
    ids = [tokenizer.encode_cif(entry.stream) for entry in entries]
    assert max(map(len, ids)) <= MAX_TOKENS
    assert unknown not in np.unique(np.concatenate(ids))
    assert {entry.key[1] for entry in entries} <= set(SPACEGROUPS)


def test_the_corpus_is_diverse(entries):
    elements = Counter(
        ion.symbol for entry in entries for ion in map(Species.from_str, entry.charges.split())
    )
    kinds = Counter(len(entry.charges.split()) for entry in entries)
    assert len(elements) >= 70
    assert max(elements.values()) <= 0.3 * COUNT
    assert min(kinds[2], kinds[3], kinds[4]) >= 100
    assert len({entry.key[1] for entry in entries}) >= 60
    assert max(Counter(entry.prototype for entry in entries).values()) <= 0.05 * COUNT


@quiet
def test_texts_parse_and_symmetrise_to_themselves(entries):
    for entry in entries[::60]:
        structure = Structure.from_str(entry.cif, fmt="cif")
        assert structure.is_ordered
        assert structure.composition == Composition(entry.key[0])
        # Whether a zero comes out as -1e-17 or 1e-17 depends on the processor, and so does its sign in the text.
        again = stream_text(preprocess_cif(symmetrized_cif(structure)))
        assert again.replace("-0.0000 ", "0.0000 ") == entry.stream.replace("-0.0000 ", "0.0000 "), entry.id


@quiet
def test_a_part_rebuilds_to_the_shipped_rows(entries, make_corpus):
    prototypes, _ = make_corpus.load_prototypes(REBUILT)
    table = make_corpus.Substitutions()
    made = {row.id: row for prototype in prototypes for row in make_corpus.offer(prototype, table).rows}
    shipped = [entry for entry in entries if entry.prototype in REBUILT]
    assert {entry.prototype for entry in shipped} == set(REBUILT)
    for entry in shipped:
        row = made[entry.id]
        assert (row.prototype, row.charges, row.key) == (entry.prototype, entry.charges, entry.key)
        assert row.cif == entry.cif


@quiet
def test_two_runs_give_the_same_bytes(make_corpus, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first.csv.xz", tmp_path / "second.csv.xz"
    for out in (first, second):
        monkeypatch.setattr(
            sys, "argv", ["make_corpus.py", f"--out={out}", "--limit=12", f"--prototypes={REBUILT[0]}"]
        )
        assert make_corpus.main() == 0
        assert "12 structures" in capsys.readouterr().out
    assert first.read_bytes() == second.read_bytes()


def test_an_unknown_prototype_is_refused(make_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["make_corpus.py", f"--out={tmp_path / 'none.csv.xz'}", "--prototypes=A_xx"]
    )
    assert make_corpus.main() == 1
    assert "A_xx" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_selection_keeps_its_limits(make_corpus):
    def row(name: str, *elements: str) -> object:
        return make_corpus.Row(name, "P", "", "", (name, "P1"), elements)

    same_system = [row(f"NaCl-{n}", "Cl", "Na") for n in range(6)]
    chosen, dropped = make_corpus.select([same_system, [row("KF", "F", "K"), row("KF", "F", "K")]], 100)
    assert [one.id for one in chosen] == ["KF", *(f"NaCl-{n}" for n in range(make_corpus.PER_SYSTEM))]
    assert dropped["chemical system is full"] == 6 - make_corpus.PER_SYSTEM
    assert dropped["same formula and space group"] == 1
