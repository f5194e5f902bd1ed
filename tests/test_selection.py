"""What is decided over all records: merging, excluding, deduplicating, splitting, marking, naming."""

import csv
import gzip
import json
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from crystallm_jax.cli.prepare import summary
from crystallm_jax.data.prepare import PrepareReport, prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.marks import read_pairs
from crystallm_jax.data.preparing.pipeline import Recipe
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import Split
from crystallm_jax.errors import DataError

AS_THEY_ARE = Recipe(stages=())
ALONE = Execution(workers=0)


class Crystal(NamedTuple):
    id: str
    formula: str
    spacegroup: str = "Fm-3m"
    volume: float = 100.0
    units: int = 4


def _text(crystal: Crystal) -> str:
    return (
        f"data_{crystal.formula.replace(' ', '')}\n_symmetry_space_group_name_H-M   {crystal.spacegroup}\n"
        f"_chemical_formula_sum   '{crystal.formula}'\n_cell_volume   {crystal.volume}\n"
        f"_cell_formula_units_Z   {crystal.units}\n"
    )


def _write(path: Path, crystals: list[Crystal], extra: list[tuple[str, str]] | None = None) -> Path:
    with path.open("w", newline="") as stream:
        rows = [(crystal.id, _text(crystal)) for crystal in crystals]
        csv.writer(stream).writerows([("id", "cif"), *rows, *(extra or [])])
    return path


def _prepare(folder: Path, crystals: list[Crystal], extra=None, **settings) -> PrepareReport:
    source = _write(folder / "in.csv", crystals, extra)
    fields = Selection.__dataclass_fields__
    selection = Selection(**{key: value for key, value in settings.items() if key in fields})
    others = {key: value for key, value in settings.items() if key not in fields}
    out = folder / "out"
    return prepare(
        [source], out, recipe=AS_THEY_ARE, selection=selection, execution=ALONE, progress=False, **others
    )


def _ids(report: PrepareReport, split: str = "train") -> list[str]:
    with gzip.open(report.out_dir / f"{split}.jsonl.gz", "rt") as lines:
        return [json.loads(line)["id"] for line in lines]


def _dropped(report: PrepareReport) -> list[tuple[str, str, str]]:
    with (report.out_dir / "dropped.csv").open(newline="") as stream:
        return [tuple(row) for row in csv.reader(stream)][1:]


SALTS = [
    Crystal("a", "Na4 Cl4", volume=180.0),
    Crystal("b", "K4 Cl4"),
    Crystal("c", "Na4 Cl4", volume=170.0),
    Crystal("d", "Na4 Cl4", "Pm-3m"),
    Crystal("e", "Na4 Cl4", volume=170.0),
]


def test_texts_pass_as_they_are(tmp_path: Path) -> None:
    report = _prepare(tmp_path, SALTS)
    assert dict(report.texts) == {"train": 5}
    assert report.splits == {}
    with gzip.open(report.out_dir / "train.jsonl.gz", "rt") as lines:
        assert [json.loads(line)["cif"] for line in lines] == [_text(crystal) for crystal in SALTS]
    assert json.loads((report.out_dir / "meta.json").read_text())["counts"] == {
        "input": 5,
        "kept": 5,
        "dropped": 0,
        "excluding": 0,
    }


def test_dedup_keeps_the_lowest_volume_where_the_first_one_stood(tmp_path: Path) -> None:
    report = _prepare(tmp_path, SALTS, dedup=True)
    assert _ids(report) == ["c", "b", "d"]
    reason = "same cell formula and space group as 'c'"
    assert _dropped(report) == [("a", "dedup", reason), ("e", "dedup", reason)]
    assert dict(report.reasons) == {("dedup", reason): 2}


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("dedup", "same cell formula and space group as …"),
        ("merge", "same reduced formula, units and space group as …"),
        ("exclude", "same reduced formula, units and space group as …, which is to be excluded"),
    ],
)
def test_the_count_of_a_reason_names_no_record_of_many(tmp_path: Path, stage: str, reason: str) -> None:
    crystals = [Crystal(f"{name}-{i}", f"{name}4 Cl4") for name in ("Na", "K", "Rb") for i in (1, 2)]
    benchmark = _write(tmp_path / "x.csv", [crystal for crystal in crystals if crystal.id[-1] == "1"][:2])
    settings = {"exclude_inputs": [benchmark]} if stage == "exclude" else {stage: True}
    report = _prepare(tmp_path, crystals, **settings)
    assert dict(report.reasons) == {(stage, reason): len(_dropped(report))}
    assert {why.count("'") for _, _, why in _dropped(report)} == {2}
    assert f"{stage}: {reason}\n" in summary(report)
    assert "-1'" not in summary(report)


def test_volumes_count_a_formula_unit_and_no_units_count_as_one(tmp_path: Path) -> None:
    crystals = [Crystal("a", "Na4 Cl4", volume=120.0, units=4), Crystal("b", "Na4 Cl4", volume=50.0, units=0)]
    assert _ids(_prepare(tmp_path, crystals, dedup=True)) == ["a"]


def test_merging_keeps_the_first(tmp_path: Path) -> None:
    report = _prepare(tmp_path, SALTS, merge=True)
    assert _ids(report) == ["a", "b", "d"]
    assert {stage for _, stage, _ in _dropped(report)} == {"merge"}


def test_exclusion_by_structure_and_by_formula(tmp_path: Path) -> None:
    benchmark = _write(tmp_path / "x.csv", [Crystal("x", "Cl4 Na4")], [("y", "no crystal")])
    by_structure = _prepare(tmp_path, SALTS, exclude_inputs=[benchmark])
    assert _ids(by_structure) == ["b", "d"]
    assert (by_structure.n_input, by_structure.n_kept, by_structure.n_dropped) == (5, 2, 3)
    assert by_structure.n_excluding == 2
    assert [drop.id for drop in by_structure.unusable] == ["y"]
    by_formula = _prepare(tmp_path, SALTS, exclude_inputs=[benchmark], exclude_by="formula")
    assert _ids(by_formula) == ["b"]
    assert "same reduced formula as 'x'" in _dropped(by_formula)[0][2]


@pytest.mark.parametrize(
    "settings", [{"dedup": True}, {"merge": True}, {"split": Split(1, 1, by="formula")}, {"exclude": True}]
)
def test_a_text_without_a_key_is_dropped_where_keys_are_compared(tmp_path: Path, settings) -> None:
    if settings.pop("exclude", False):
        settings["exclude_inputs"] = [_write(tmp_path / "x.csv", [Crystal("x", "He1")])]
    crystals = [Crystal(name, f"{name}4 Cl4") for name in ("Na", "K", "Rb", "Cs")]
    report = _prepare(tmp_path, crystals, [("odd", "data_odd\n_cell_length_a 4\n")], **settings)
    ((name, stage, reason),) = _dropped(report)
    assert name == "odd"
    assert f"leave out --{stage}" in reason
    assert report.n_kept == 4


def test_a_structure_to_exclude_excludes_whatever_becomes_of_it(fixtures: Path, tmp_path: Path) -> None:
    salt = fixtures / "data" / "rocksalt.cif"
    alloy = tmp_path / "alloy.cif"
    alloy.write_text(salt.read_text().replace("Na", "Au").replace("Cl", "Cu"))
    recipe = Recipe(oxidation_states=True)  # of an alloy none balance, so the reference itself is refused
    report = prepare(
        [salt, alloy],
        tmp_path / "out",
        exclude_inputs=[alloy],
        recipe=recipe,
        execution=ALONE,
        progress=False,
    )
    assert report.unusable == ()
    assert (report.n_input, report.n_kept, report.n_excluding) == (2, 1, 1)


def test_a_second_input_of_no_known_kind_ends_the_run_at_once(fixtures: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "x.bin"
    wrong.write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"x\.bin"):
        prepare([fixtures / "data", wrong], tmp_path / "out", execution=ALONE, progress=False)
    assert not (tmp_path / "out").exists()


def test_no_polymorph_leaks_and_space_groups_are_stratified(tmp_path: Path) -> None:
    groups = ("Fm-3m", "Pm-3m", "P4_2/mnm", "Pnma")
    crystals = [
        Crystal(f"{metal}-{group}", f"{metal}4 Cl4", group)
        for metal in ("Li", "Na", "K", "Rb", "Cs", "Ag", "Cu", "Tl", "Au", "In")
        for group in groups
    ]
    by_formula = _prepare(tmp_path, crystals, split=Split(0.2, 0.2, by="formula"))
    metals = [{name.split("-")[0] for name in _ids(by_formula, split)} for split in ("train", "val", "test")]
    assert [len(m) for m in metals] == [7, 1, 2]
    assert len(set.union(*metals)) == 10
    by_group = _prepare(tmp_path, crystals, split=Split(0.25, 0.2, by="spacegroup"))
    tested = [name.split("-", 1)[1] for name in _ids(by_group, "test")]
    assert sorted(tested) == sorted(groups * 2)


def test_repeated_ids_get_numbers_and_others_keep_their_names(tmp_path: Path) -> None:
    names = ["x", "x", "x", "x_2", "x", " y  z ", ""]
    report = _prepare(tmp_path, [Crystal(name, "Na4 Cl4") for name in names])
    assert _ids(report) == ["x", "x_3", "x_4", "x_2", "x_5", "y_z", "7"]


def test_shuffling_depends_on_the_seed_alone(tmp_path: Path) -> None:
    crystals = [Crystal(str(i), f"Na{i} Cl4") for i in range(1, 40)]
    orders = [_ids(_prepare(tmp_path, crystals, shuffle=True, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(crystal.id for crystal in crystals)


def _marked(report: PrepareReport) -> list[str]:
    with gzip.open(report.out_dir / "train.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    return [record["id"] for record in records if record.get("underrepresented")]


def test_pairs_and_rare_space_groups_are_marked(tmp_path: Path) -> None:
    listed = tmp_path / "pairs.csv"
    listed.write_text("composition,spacegroup\nCl4Na4,225\nK4Cl4,Pm-3m\n")
    report = _prepare(tmp_path, SALTS, underrepresented=listed)
    assert _marked(report) == ["a", "c", "e"]
    assert report.n_underrepresented == 3
    assert _marked(_prepare(tmp_path, SALTS, underrepresented_below=2)) == ["d"]
    assert _marked(_prepare(tmp_path, SALTS, underrepresented_below=5)) == ["a", "b", "c", "d", "e"]


def test_the_published_list_of_pairs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.pkl"
    path.write_bytes(pickle.dumps([("Na4Cl4", "Fm-3m"), ("K4Cl4", "Pm-3m")]))
    assert list(read_pairs(path)) == [("Na4Cl4", "Fm-3m"), ("K4Cl4", "Pm-3m")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "lacks the columns"),
        (b"composition,spacegroup\nXx4,Fm-3m\n", "pair 1: 'Xx' is not an element"),
        (b"composition,spacegroup\nNa4Cl4,Q\n", "pair 1: space group 'Q'"),
        (b"\xff\xfe,\n", "no valid CSV"),
        (pickle.dumps(["Na4Cl4"]), "no \\(cell composition, space group\\)"),
        (b"\x80\x04cos\nsystem\n.", "pairs"),
    ],
)
def test_files_of_pairs_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_pairs(path))
    with pytest.raises(DataError, match="no file"):
        read_pairs(tmp_path / "nowhere")


def test_each_stage_alone_gives_what_one_run_gives(fixtures: Path, tmp_path: Path) -> None:
    crystals = [fixtures / "data" / f"{name}.cif" for name in ("rocksalt", "perovskite", "caesium_chloride")]
    crystals += [fixtures / "data" / "halite_symmetric.cif"]
    settings = {"execution": ALONE, "progress": False}
    whole = Selection(dedup=True, split=Split(1, 1))
    at_once = prepare(crystals, tmp_path / "once", selection=whole, **settings)
    steps = [
        (Recipe(stages=("symmetrise",)), Selection()),
        (Recipe(stages=()), Selection(dedup=True)),
        (Recipe(stages=("preprocess",)), Selection()),
        (Recipe(stages=()), Selection(split=Split(1, 1))),
    ]
    sources = [*crystals]
    for number, (recipe, selection) in enumerate(steps):
        out = tmp_path / str(number)
        prepare(sources, out, recipe=recipe, selection=selection, **settings)
        sources = [out / "train.jsonl.gz"]
    last = tmp_path / "3"
    by_steps = prepare(
        sources,
        tmp_path / "steps",
        val_inputs=[last / "val.jsonl.gz"],
        test_inputs=[last / "test.jsonl.gz"],
        recipe=Recipe(stages=("tokenise",)),
        **settings,
    )
    assert at_once.splits == by_steps.splits
    for name in ("train.bin", "val.bin", "test.bin", "train.starts.npy", "train.ids.txt"):
        assert (at_once.out_dir / name).read_bytes() == (by_steps.out_dir / name).read_bytes()
    assert np.load(at_once.out_dir / "train.starts.npy").tolist() == [0]
