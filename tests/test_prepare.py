"""Preparation: files to a store, the same bytes by any number of workers, every input accounted for."""

import argparse
import csv
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.cli.flags import prepare as verb
from crystallm_jax.cli.prepare import run
from crystallm_jax.data import Record, TokenStore
from crystallm_jax.data import prepare as prepare_module
from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.pipeline import Dropped, Prepared, Recipe, prepare_one
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import PUBLISHED_SEED, PUBLISHED_SPLIT, Split
from crystallm_jax.data.reading.structures import parse_structure, read_plain_cell
from crystallm_jax.errors import CIFError, ConfigError, DataError

RECIPE = Recipe()
ALONE = Execution(workers=0)
GOOD = ("caesium_chloride", "halite_symmetric", "perovskite", "prepared", "rocksalt")
BAD = ("partial", "polonium", "unknown_element")


@pytest.fixture
def cifs(fixtures: Path) -> Path:
    return fixtures / "data"


def _scaled(cifs: Path, lengths: list[float]) -> list[tuple[str, str]]:
    """Rock salt with other cell lengths, (id, text)."""
    text = (cifs / "rocksalt.cif").read_text()
    return [(f"salt-{i}", text.replace("3.98800000", f"{length:.8f}")) for i, length in enumerate(lengths)]


def _write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "cif"), *rows])
    return path


def _crowd(n: int) -> str:
    """A cell of n atoms, some 2 Å apart."""
    side = round(n ** (1 / 3)) + 1
    points = itertools.islice(itertools.product(range(side), repeat=3), n)
    rows = [
        f"  Na  Na{i}  1  " + "  ".join(f"{x / side:.8f}" for x in p) + "  1" for i, p in enumerate(points)
    ]
    lengths = "\n".join(f"_cell_length_{k}   {2 * side}" for k in "abc")
    angles = "\n".join(f"_cell_angle_{k}   90" for k in ("alpha", "beta", "gamma"))
    columns = "\n".join(
        f" _atom_site_{k}" for k in ("type_symbol", "label", "symmetry_multiplicity", *_AXES, "occupancy")
    )
    return (
        f"data_Na\n_symmetry_space_group_name_H-M   'P 1'\n{lengths}\n{angles}\nloop_\n{columns}\n"
        + "\n".join(rows)
    )


_AXES = ("fract_x", "fract_y", "fract_z")


def test_a_folder_becomes_a_store(cifs: Path, tmp_path: Path) -> None:
    report = prepare([cifs], tmp_path / "out", execution=ALONE, progress=False)
    assert (report.n_input, report.n_kept, report.n_dropped) == (len(GOOD) + len(BAD), len(GOOD), len(BAD))
    store = TokenStore.open(report.out_dir)
    assert store.ids == GOOD
    store.verify()
    text = stream_text(preprocess_cif(symmetrized_cif(parse_structure((cifs / "rocksalt.cif").read_text()))))
    assert store.record(GOOD.index("rocksalt")).tolist() == CIFTokenizer().encode_cif(text).tolist()
    assert store.text(GOOD.index("rocksalt")) == text.replace("  ", " ").replace("  ", " ")
    assert store.text(GOOD.index("prepared")) == store.text(GOOD.index("rocksalt"))
    assert report.n_tokens == len(store.tokens)
    with (report.out_dir / "dropped.csv").open(newline="") as stream:
        dropped = list(csv.DictReader(stream))
    assert [row["id"] for row in dropped] == list(BAD)
    assert all(row["stage"] == "parse" for row in dropped)
    header = json.loads((report.out_dir / "meta.json").read_text())
    assert header["counts"] == {"input": 8, "kept": 5, "dropped": 3, "excluding": 0}
    assert header["sources"] == [str(cifs)]
    assert {"python", "numpy", "pymatgen", "spglib", "crystallm-jax"} <= header["versions"].keys()


def test_workers_give_the_same_bytes_as_none(
    cifs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH", 3)
    source = _write_csv(
        tmp_path / "x.csv", [*_scaled(cifs, [3.5 + i / 40 for i in range(30)]), ("junk", "?")]
    )
    selection = Selection(dedup=True, split=Split(0.2, 0.1), shuffle=True)
    for workers in (0, 2):
        prepare(
            [source, cifs],
            tmp_path / str(workers),
            selection=selection,
            execution=Execution(workers),
            progress=False,
        )
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    assert {"train.bin", "val.bin", "test.bin", "dropped.csv"} <= set(names)
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_only_the_culprit_of_a_slow_batch_is_dropped(cifs: Path, tmp_path: Path) -> None:
    # Of 1,900 atoms on a grid, the search for translations takes a minute.
    slow = _crowd(1900)
    rows = _scaled(cifs, [3.9, 4.0, 4.1])
    source = _write_csv(tmp_path / "x.csv", [rows[0], ("slow", slow), *rows[1:]])
    report = prepare([source], tmp_path / "out", execution=Execution(1, 4.0), progress=False)
    assert TokenStore.open(report.out_dir).ids == ("salt-0", "salt-1", "salt-2")
    assert (
        (report.out_dir / "dropped.csv").read_text().splitlines()[1].startswith("slow,limit,no result in 4 s")
    )


def test_dedup_keeps_the_lowest_volume_a_formula_unit(cifs: Path, tmp_path: Path) -> None:
    source = _write_csv(tmp_path / "x.csv", _scaled(cifs, [4.2, 4.0, 4.1, 4.0]))
    report = prepare(
        [source, cifs / "perovskite.cif"],
        tmp_path / "out",
        selection=Selection(dedup=True),
        execution=ALONE,
        progress=False,
    )
    assert TokenStore.open(report.out_dir).ids == ("salt-1", "perovskite")
    assert (report.n_input, report.n_kept, report.n_dropped) == (5, 2, 3)
    lines = (report.out_dir / "dropped.csv").read_text().splitlines()
    assert lines[1] == "salt-0,dedup,same cell formula and space group as 'salt-1'"


@pytest.mark.parametrize(
    ("change", "stage", "reason"),
    [
        (lambda text: "", "parse", "no structure could be read"),
        (lambda text: text[:200], "parse", "it has no '_atom_site_label'"),
        (lambda text: text.replace("  Cl  ", "  Xx  "), "parse", "'Xx', which has no token"),
        (lambda text: text.replace("  Cl  ", "  D  "), "symmetrise", "isotope of hydrogen"),
        (lambda text: text.replace("0.50000000  1", "0.50000000  0.7"), "parse", "partially occupied"),
        (lambda text: text + text.replace("data_NaCl", "data_other"), "parse", "2 structures"),
        (lambda text: text.replace("3.98800000", "0.00000000"), "parse", ""),
        (lambda text: text.replace("3.98800000", "nan"), "parse", "has no volume"),
        (lambda text: _crowd(2500), "parse", "the text lists 2,500 atoms, at most 2,000"),
    ],
)
def test_what_cannot_be_kept_says_why(cifs: Path, change, stage: str, reason: str) -> None:
    outcome = prepare_one(Record("x", change((cifs / "rocksalt.cif").read_text())), RECIPE)
    assert isinstance(outcome, Dropped)
    assert outcome.stage == stage
    assert reason in outcome.reason
    assert "\n" not in outcome.reason


def test_five_thousand_atoms_made_by_symmetry_are_refused(cifs: Path) -> None:
    text = (cifs / "halite_symmetric.cif").read_text()
    rows = "".join(f"H{i} H {0.01 + 0.001 * i} {0.1 + 0.0007 * i} {0.2 + 0.0003 * i}\n" for i in range(14))
    with pytest.raises(CIFError, match="atoms, at most 2,000"):
        parse_structure(text + rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("data_Na4Cl4", "data_Qq4"), "the line 'data_Qq4'"),
        (lambda text: text + text, "2 'data_' lines"),
        (lambda text: text.replace("data_Na4Cl4", ""), "0 'data_' lines"),
    ],
)
def test_prepared_texts_must_be_records_of_the_dialect(cifs: Path, change, reason: str) -> None:
    outcome = prepare_one(Record("x", change((cifs / "prepared.cif").read_text())), RECIPE)
    assert isinstance(outcome, Dropped)
    assert outcome.stage == "tokenise"
    assert reason in outcome.reason


def test_an_oxidation_loop_does_not_make_a_text_prepared(cifs: Path) -> None:
    loop = "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nNa+ 1\nCl- -1\n"
    text = (
        (cifs / "halite_symmetric.cif").read_text().replace("loop_\n_atom_site", loop + "loop_\n_atom_site")
    )
    outcome = prepare_one(Record("x", text), RECIPE)
    assert isinstance(outcome, Prepared)
    assert outcome.key is not None
    assert outcome.key[:4] == ("Na4Cl4", "Fm-3m", "Cl1Na1", 4)


def test_oxidation_states_are_those_that_the_text_states_or_guessed(cifs: Path) -> None:
    loop = "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nNa+ 0.5\nCl- -0.5\n"
    text = (cifs / "halite_symmetric.cif").read_text()
    stated = text.replace("loop_\n_atom_site", loop + "loop_\n_atom_site")
    recipe = Recipe(oxidation_states=True)
    bare = text.replace("Na+", "Na").replace("Cl-", "Cl")
    for source, state in ((text, "1.0"), (bare, "1.0"), (stated, "0.5")):
        outcome = prepare_one(Record("x", source), recipe)
        assert isinstance(outcome, Prepared)
        written = CIFTokenizer().decode(np.frombuffer(outcome.payload, "<u2").tolist())
        assert "_atom_type_oxidation_number\n" in written
        (row,) = [line for line in written.splitlines() if line.startswith("Na ") and len(line.split()) == 5]
        assert row.split()[-1] == state


def test_nothing_kept_is_an_error_and_leaves_nothing(cifs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 records can be kept; most often \(1\), at 'parse'"):
        prepare([cifs / "partial.cif"], tmp_path / "out", execution=ALONE, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Recipe(symprec=0.0),
        lambda: Recipe(decimal_places=0),
        lambda: Recipe(stages=("symmetrise", "tokenise")),
        lambda: Recipe(stages=("tokenise",), oxidation_states=True),
        lambda: Execution(time_limit=0.0),
        lambda: Execution(workers=-1),
        lambda: Execution(workers=0, executor="ray"),
        lambda: Split(0.1, 1.5),
        lambda: Selection(seed=-1),
        lambda: Selection(underrepresented_below=0),
    ],
)
def test_options_out_of_range(wrong) -> None:
    with pytest.raises(ConfigError, match=r"give|add"):
        wrong()


def test_an_input_that_breaks_off_ends_the_run(cifs: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.csv.gz"
    rows = [f"{i},data_{i * 7919}" for i in range(3000)]
    source.write_bytes(gzip.compress("\n".join(["id,cif", *rows]).encode())[:-200])
    with pytest.raises(DataError, match="check that it is whole"):
        prepare([cifs, source], tmp_path / "out", execution=ALONE, progress=False)
    assert not (tmp_path / "out" / "train.bin").exists()


def _same(text: str) -> bool:
    """Whether the fast reader gives pymatgen's structure, to the last bit."""
    from pymatgen.io.cif import CifParser

    assert read_plain_cell(text) is not None
    ours, theirs = parse_structure(text), CifParser.from_str(text).parse_structures(primitive=False)[0]
    return (
        ours == theirs
        and [s.label for s in ours] == [s.label for s in theirs]
        and [s.species_string for s in ours] == [s.species_string for s in theirs]
        and np.array_equal(ours.frac_coords, theirs.frac_coords)
        and np.array_equal(ours.lattice.matrix, theirs.lattice.matrix)
    )


@pytest.mark.filterwarnings("ignore")
def test_plain_cells_are_read_as_pymatgen_reads_them(cifs: Path) -> None:
    text = (cifs / "perovskite.cif").read_text()
    variants = [
        text,
        text.replace("0.50000000", "0.33330000").replace(" 0.00000000", " -0.83330001"),
        text.replace("90.00000000", "81.5"),
        text.replace("  O  O4", "  Ti  O4").replace("  Sr  ", "  Cs  "),
        text.replace(" 0.50000000", " 1.50000000").replace("  Ti  ", "  F  "),
    ]
    assert all(_same(variant) for variant in variants)


@pytest.mark.filterwarnings("ignore")
def test_golden_cells_are_read_as_pymatgen_reads_them(golden: Path) -> None:
    with gzip.open(golden / "prep.jsonl.gz", "rt") as stream:
        texts = [json.loads(line)["raw_cif"] for line in stream]
    assert len(texts) == 150
    assert all(_same(text) for text in texts)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("'P 1'", "'P m m m'"),
        lambda text: text.replace("1  'x, y, z'", "1  'x, y, z'\n  2  '-x, -y, -z'"),
        lambda text: text.replace("0.50000000  1\n", "0.50000000  0.5\n"),
        lambda text: text.replace("3.98800000", "3.988(2)"),
        lambda text: text.replace("  Cl  ", "  Cl-  "),
        lambda text: text.replace("loop_\n _atom_site_type", "_publ_x 1\nloop_\n _atom_site_type"),
        lambda text: text.replace("  Na0", "  'Na 0'"),
        lambda text: text + text,
        lambda text: text + ";\n",
    ],
)
def test_anything_unusual_is_left_to_pymatgen(cifs: Path, change) -> None:
    assert read_plain_cell(change((cifs / "rocksalt.cif").read_text())) is None


def test_golden_streams(golden: Path, tmp_path: Path) -> None:
    with gzip.open(golden / "prep.jsonl.gz", "rt") as stream:
        records = [json.loads(line) for line in stream]
    source = _write_csv(tmp_path / "x.csv", [(r["id"], r["raw_cif"]) for r in records])
    prepare([source], tmp_path / "out", execution=ALONE, progress=False)
    store = TokenStore.open(tmp_path / "out")
    assert len(store) == len(records)
    same = sum(store.record(i).tolist() == record["token_ids"] for i, record in enumerate(records))
    assert same >= 0.95 * len(records)


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    return parser.parse_args(["prepare", *arguments])


def test_the_verb(cifs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = _parse(
        str(cifs), "--out", str(tmp_path / "out"), "--workers", "0", "--dedup", "--split", "0.3,0.2"
    )
    assert run(args) == 0
    printed = capsys.readouterr().out
    assert "8 structures read, 3 kept, 5 dropped" in printed
    assert "parse: site" in printed
    assert "dropped.csv" in printed
    assert "next: crystallm train" in printed
    assert _parse("x", "--out", "y", "--split").split == PUBLISHED_SPLIT
    assert _parse("x", "--out", "y").seed == PUBLISHED_SEED


@pytest.mark.parametrize("value", ["0.1", "a,b", "1,2,3"])
def test_a_wrong_split_is_wrong_usage(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse("x", "--out", "y", "--split", value)
    assert caught.value.code == 2
    assert "such as 0.1,0.0045" in capsys.readouterr().err


def test_sets_that_are_apart_stay_apart_and_drops_do_not_shift_them(cifs: Path, tmp_path: Path) -> None:
    names = {
        "train": ["partial", "rocksalt"],
        "val": ["polonium", "perovskite"],
        "test": ["caesium_chloride"],
    }
    paths = {split: [cifs / f"{name}.cif" for name in group] for split, group in names.items()}
    out = tmp_path / "store"
    report = prepare(
        paths["train"],
        out,
        val_inputs=paths["val"],
        test_inputs=paths["test"],
        execution=ALONE,
        progress=False,
    )
    assert (report.n_input, report.n_kept, report.n_dropped) == (5, 3, 2)
    kept = {split: TokenStore.open(out, split).ids for split in names}
    assert kept == {"train": ("rocksalt",), "val": ("perovskite",), "test": ("caesium_chloride",)}


def test_a_set_of_which_nothing_is_left_is_refused(cifs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 records of the val set"):
        prepare(
            [cifs / "rocksalt.cif"],
            tmp_path / "store",
            val_inputs=[cifs / "polonium.cif"],
            execution=ALONE,
            progress=False,
        )
    assert not (tmp_path / "store" / "train.bin").exists()


def test_fractions_and_sets_of_their_own_do_not_go_together(cifs: Path, tmp_path: Path) -> None:
    salt = cifs / "rocksalt.cif"
    with pytest.raises(ConfigError, match="cannot go together"):
        prepare(
            [salt],
            tmp_path / "store",
            val_inputs=[salt],
            selection=Selection(split=Split(0.1, 0.1)),
            execution=ALONE,
            progress=False,
        )
