"""Readers: every supported input, and one-line errors for the others."""

import csv
import gzip
import io
import lzma
from pathlib import Path

import pytest

from crystallm_jax.data import Record, read_records
from crystallm_jax.data.readers import unique_ids
from crystallm_jax.errors import DataError


def _csv_text(rows: list[list[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    return stream.getvalue()


def test_a_folder_is_read_to_its_bottom_in_sorted_order(tmp_path: Path, fixtures: Path) -> None:
    text = (fixtures / "data" / "rocksalt.cif").read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.cif").write_text(text)
    (tmp_path / "a.CIF").write_text(text)
    (tmp_path / "c.cif").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "notes.txt").write_text("not a crystal")
    assert list(read_records(tmp_path)) == [Record("a", text), Record("b/two", text), Record("c", text)]


def test_bad_files_of_a_folder_are_handed_on_with_their_problem(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_bytes(b"")
    (tmp_path / "b.cif").write_bytes(b"data_x \xff\xfe")
    (tmp_path / "c.cif").write_bytes(b"\x7fELF\x00\x01")
    (tmp_path / "d.cif").write_text("data_fine\n")
    empty, latin, binary, fine = read_records(tmp_path)
    assert "empty" in str(empty.problem)
    assert "not UTF-8 (byte 7)" in str(latin.problem)
    assert "binary" in str(binary.problem)
    assert fine == Record("d", "data_fine\n")
    assert not any("\n" in str(r.problem) for r in (empty, latin, binary))


def test_a_cif_of_several_structures_gives_one_record_each(tmp_path: Path, fixtures: Path) -> None:
    one = (fixtures / "data" / "rocksalt.cif").read_text()
    two = (fixtures / "data" / "perovskite.cif").read_text()
    path = tmp_path / "both.cif"
    path.write_text("data_global\n_audit_creation_method made\n" + one + two)
    records = list(read_records(path))
    assert [r.id for r in records] == ["both#NaCl", "both#SrTiO3"]
    assert records[1].cif == two


def test_blocks_without_atoms_do_not_divide_a_cif(fixtures: Path) -> None:
    path = fixtures / "data" / "halite_symmetric.cif"
    assert list(read_records(path)) == [Record("halite_symmetric", path.read_text())]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_a_csv_is_read_whatever_its_compression_is_called(tmp_path: Path, pack) -> None:
    text = _csv_text(
        [["source", "material_id", "cif"], ["s", "mp-1", "data_a\n_x 'y'\n"], ["s", "mp-2", "data_b"]]
    )
    path = tmp_path / "crystals.csv"
    path.write_bytes(pack(text.encode()))
    assert list(read_records(path)) == [Record("mp-1", "data_a\n_x 'y'\n"), Record("mp-2", "data_b")]


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        (["id", "cif"], ["p", "q"]),
        (["ID", "cif"], ["p", "q"]),
        (["name", "cif"], ["1", "2"]),
        (["mp_id", "cif"], ["p", "q"]),
    ],
)
def test_ids_of_a_csv(tmp_path: Path, header: list[str], ids: list[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\ufeff" + _csv_text([header, ["p", "data_a"], ["q", "data_b"]]), encoding="utf-8")
    assert [r.id for r in read_records(path)] == ids


def test_a_field_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(_csv_text([["cif"], ["data_" + "x" * 200_000]]))
    (record,) = read_records(path)
    assert len(record.text) == 200_005


def test_bad_rows_are_handed_on_with_their_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'id,cif\na,\nb,data_b,too many\nc,data_\xff\nd,"data_d\n"\n')
    empty, wide, latin, fine = read_records(path)
    assert "empty 'cif'" in str(empty.problem)
    assert "3 fields where the header has 2" in str(wide.problem)
    assert "not UTF-8" in str(latin.problem)
    assert fine == Record("d", "data_d\n")


def test_repeated_and_blank_ids_become_unique() -> None:
    names = ["a", "a", "a_2", "", "two words", "a"]
    found = [r.id for r in unique_ids(Record(n, "") for n in names)]
    assert found == ["a", "a_2", "a_2_2", "unnamed", "two_words", "a_3"]
    again = [r.id for r in unique_ids(Record(n, "") for n in found)]
    assert again == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty"),
        ("x.csv", b"a,b\n1,2\n", r"no column 'cif' \(columns: 'a', 'b'\)"),
        ("x.csv", b"id,cif\n", "no rows"),
        ("x.csv", bytes(range(256)) * 8, "binary"),
        ("x.csv", b'id,cif\n1,"data_a\n', "no valid CSV"),
        ("x.csv.gz", gzip.compress(b"id,cif\n" + bytes(9000))[:20], "cannot be read|binary"),
        ("x.cif", b" \n", "is empty"),
        ("x.cif", b"\x00\x01", "binary"),
        ("x.cif", "data_é".encode("latin-1"), "not UTF-8"),
        ("x.zip", b"PK", "not read yet; give a folder of .cif files"),
        ("x.jsonl.gz", b"{}", "not read yet"),
        ("x.pkl.gz", b"..", "not read yet"),
        ("x.docx", b"PK", "unknown kind of file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_truncated_gzip_ends_with_an_error_after_its_good_rows(tmp_path: Path) -> None:
    rows = _csv_text([["id", "cif"], *([str(i), f"data_{i * 7919}"] for i in range(50_000))])
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(rows.encode())[:-1000])
    records = read_records(path)
    assert next(records).id == "0"
    with pytest.raises(DataError, match="check that it is whole"):
        list(records)


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.cif files in the folder"):
        read_records(tmp_path)


def test_real_crystals(crystals: Path) -> None:
    records = list(read_records(crystals / "carbon_24" / "val.csv.gz"))
    assert len(records) == len({r.id for r in records}) == 300
    assert all(r.text.startswith("# generated") for r in records)
