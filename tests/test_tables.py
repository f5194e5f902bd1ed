"""Tables: lines of JSON, Parquet, pickled lists and extended-XYZ frames, a record a row."""

import gzip
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from crystallm_jax.data import Record, read_records
from crystallm_jax.data.reading import extxyz, streams, table_files
from crystallm_jax.data.reading.texts import find_id_column, value_id
from crystallm_jax.errors import DataError

SITES = {
    "lattice_vectors": [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]],
    "species_at_sites": ["Po"],
    "cartesian_site_positions": [[0.0, 0.0, 0.0]],
}
STRUCTURE = {"@class": "Structure", "lattice": {"matrix": SITES["lattice_vectors"]}, "sites": []}


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["cif", "id", "material_id"], "material_id"),
        (["ID ", "cif"], "ID "),
        (["immutable_id", "cod_id"], "immutable_id"),
        (["valid", "grid", "mp_id", "cod_id"], "mp_id"),
        (["jid"], "jid"),
        (["cif", "is_valid"], None),
        ([], None),
    ],
)
def test_the_column_of_ids(columns: list[str], found: str | None) -> None:
    assert find_id_column(columns) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("mp-1", "mp-1"),
        (" mp 1 ", "mp 1"),
        (12, "12"),
        (10**400, "7"),
        ("", "7"),
        ("a\nb", "7"),
        ("x" * 5000, "7"),
        (None, "7"),
        (True, "7"),
        ([1], "7"),
        (1.5, "7"),
    ],
)
def test_ids_that_are_none_become_row_numbers(value: object, found: str) -> None:
    assert value_id(value, 7) == found


def test_every_form_of_a_row(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "cif": "data_a"},
        {"material_id": "b", "structure": STRUCTURE},
        {"material_id": "c", "structure": json.dumps(STRUCTURE), "cif": None},
        {"immutable_id": "d", **SITES, "energy": -1.5},
        {**STRUCTURE},
    ]
    records = list(read_records(_jsonl(tmp_path / "x.jsonl", rows)))
    assert [(r.id, r.form, r.problem) for r in records] == [
        ("a", "cif", None),
        ("b", "json", None),
        ("c", "json", None),
        ("d", "json", None),
        ("5", "json", None),
    ]
    assert [json.loads(r.text) for r in records[1:]] == [STRUCTURE, STRUCTURE, SITES, STRUCTURE]


def test_bad_rows_of_jsonl_are_handed_on_with_their_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        b'\xef\xbb\xbf{"cif": "data_a"}',
        b"",
        b"not json",
        b"[1]",
        b'{"id": "q", "cif": ""}',
        b'{"cif": 5}',
        b'{"name": "x"}',
        b'{"cif": "data_\\ud800"}',
        b'{"structure": "\\ud800"}',
        b'{"structure": " "}',
        b"[" * 100_000,
        b'{"cif": "data_\xff"}',
        b'{"cif": "data_z"}',
    ]
    path.write_bytes(b"\r\n".join(lines))
    first, *bad, last = read_records(path)
    assert (first, last) == (Record("1", "data_a"), Record("12", "data_z"))
    problems = ["no JSON", "no JSON", "empty 'cif'", "no text but int", "no 'cif', no 'structure'"]
    problems += ["not UTF-8", "not UTF-8", "empty 'structure'", "no JSON", "no JSON"]
    assert [part in str(r.problem) for part, r in zip(problems, bad, strict=True)] == [True] * 10
    assert not any("\n" in str(r.problem) or r.text for r in bad)
    assert bad[2].id == "q"


def test_rows_that_are_too_large_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LARGEST_TEXT", 1000)
    path = _jsonl(tmp_path / "x.jsonl", [{"cif": "data_a"}, {"cif": "x" * 5000}, {"cif": "data_b"}])
    first, large, last = read_records(path)
    assert (first.text, last.text) == ("data_a", "data_b")
    assert "row 2 is over" in str(large.problem)


def test_a_pickled_list_of_pairs(tmp_path: Path) -> None:
    rows = [("mp-1", "data_a"), (17, "data_b"), ["x", "data_c"], ("y", ""), ("z", 5), "odd", ("a", "b", "c")]
    path = tmp_path / "cifs.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(rows)))
    records = list(read_records(path))
    assert records[:3] == [Record("mp-1", "data_a"), Record("17", "data_b"), Record("x", "data_c")]
    parts = ["an empty 'cif'", "no text but int", "no pair", "no pair"]
    assert all(part in str(r.problem) for part, r in zip(parts, records[3:], strict=True))
    path.write_bytes(gzip.compress(pickle.dumps([("a", Path("b"))])))
    with pytest.raises(DataError, match=r"cifs\.pkl\.gz: refused as a pickle .*pathlib"):
        read_records(path)


def _parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_cifs_and_with_structures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_BATCH_ROWS", 2)
    ids, texts = ["a", "b", "c", "d", "e"], ["data_a", None, "data_c", "", "data_e"]
    records = list(read_records(_parquet(tmp_path / "a.parquet", {"cif": texts, "x": ids, "my_id": ids})))
    assert [r.id for r in records] == ids
    assert [r.text for r in records] == ["data_a", "", "data_c", "", "data_e"]
    assert [r.problem is None for r in records] == [True, False, True, False, True]
    columns = {"immutable_id": ["p", "q"], **{key: [value, value] for key, value in SITES.items()}}
    for record, name in zip(read_records(_parquet(tmp_path / "b", columns)), "pq", strict=True):
        assert (record.id, record.form, json.loads(record.text)) == (name, "json", SITES)
    (record,) = read_records(_parquet(tmp_path / "c", {"structure": [STRUCTURE["lattice"]]}))
    assert json.loads(record.text) == STRUCTURE["lattice"]


def test_parquet_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _parquet(tmp_path / "x.parquet", {"a": [1], "b": ["x"]})
    with pytest.raises(DataError, match=r"no column 'cif' or 'structure' \(columns: 'a', 'b'\)"):
        read_records(path)
    with pytest.raises(DataError, match="holds no structures"):
        read_records(_parquet(tmp_path / "y.parquet", {"cif": []}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'crystallm-jax\[parquet\]'"):
        read_records(path)


FRAME = '2\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 {}\nCs 0 0 0\nCl 2 2 2\n'


def test_frames_are_cut_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.extxyz"
    comments = ["energy=-3.5 material_id=mp-1", 'id="two words"', "valid=T grid=5", "cod_id='7'"]
    path.write_text("\n".join(FRAME.format(comment) for comment in comments) + "\n\n")
    records = list(read_records(path))
    assert [r.id for r in records] == ["mp-1", "two words", "3", "7"]
    assert records == [
        Record(r.id, FRAME.format(c), form="extxyz") for r, c in zip(records, comments, strict=True)
    ]


def test_frames_that_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.extxyz"
    for text, message in (
        (FRAME + "Cl 2 2 2\n", "line 5 should be the number of atoms of frame 2"),
        (FRAME + FRAME[:60], r"frame 2 \(line 5\) is cut short"),
        ("9" * 18 + "\n" + FRAME[2:], r"frame 1 \(line 1\) is cut short"),
        ("9" * 30 + "\n" + FRAME[2:], "line 1 should be the number of atoms"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            list(read_records(path))
    path.write_bytes(FRAME.format("é").encode("latin-1") + FRAME.encode())
    latin, fine = read_records(path)
    assert "not UTF-8" in str(latin.problem)
    assert fine.text == FRAME
    monkeypatch.setattr(extxyz, "LARGEST_TEXT", 150)
    path.write_text(FRAME.format("x" * 200) + FRAME)
    large, fine = read_records(path)
    assert "is over" in str(large.problem)
    assert (large.text, fine.text) == ("", FRAME)
