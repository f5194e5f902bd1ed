"""Readers: every supported input, and one-line errors for the others."""

import csv
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from crystallm_jax.data import Record, read_records
from crystallm_jax.data.readers import input_bytes, recognise
from crystallm_jax.data.reading import table_files
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
    assert records[1].text == two


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty"),
        ("x.csv", b"a,b\n1,2\n", r"no column 'cif' \(columns: 'a', 'b'\)"),
        ("x.csv", b"id,cif\n", "no rows"),
        ("x.csv", bytes(range(256)) * 8, "binary"),
        ("x.csv", b'id,cif\n1,"data_a\n', "no valid CSV"),
        # Without a time inside: the test's id is made of the bytes, and is the same in every process.
        ("x.csv.gz", gzip.compress(b"id,cif\n" + bytes(9000), mtime=0)[:20], "cannot be read|binary"),
        ("x.cif", b" \n", "is empty"),
        ("x.cif", b"\x00\x01", "binary"),
        ("x.cif", "data_é".encode("latin-1"), "not UTF-8"),
        ("x.zip", b"PK", "cannot be read"),
        ("x.zip", b"PK\x03\x04" + bytes(100), "cannot be read"),
        ("x.tar.gz", gzip.compress(b"no tar", mtime=0), "cannot be read"),
        ("x.tar", b"not a tar at all " * 60, "cannot be read"),
        ("x.jsonl", b"[1, 2]", "the first line is no JSON object"),
        ("x.jsonl", b'{\n "cif": "data_a"\n}', "the first line is no JSON object"),
        ("x.json", b" \n", "holds no structures"),
        ("x.extxyz", b"two\n\n", "line 1 should be the number of atoms"),
        ("x.parquet", b"PAR1 and no more", "cannot be read"),
        ("x.pkl.gz", b"..", "refused as a pickle"),
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


KINDS = ("cif", "csv", "zip", "tar", "jsonl", "extxyz", "parquet", "pickle")
COMPRESSED = {"cif", "csv", "tar", "jsonl", "extxyz", "pickle"}


def _content(kind: str, text: str) -> bytes:
    """One crystal, `mp-1`, in each kind of file."""
    stream = io.BytesIO()
    if kind == "csv":
        return _csv_text([["material_id", "cif"], ["mp-1", text]]).encode()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("mp-1.cif", text)
    elif kind == "tar":
        with tarfile.open(fileobj=stream, mode="w") as archive:
            info = tarfile.TarInfo("mp-1.cif")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    elif kind == "jsonl":
        return json.dumps({"material_id": "mp-1", "cif": text}).encode() + b"\n"
    elif kind == "extxyz":
        return b'1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 material_id=mp-1\nPo 0 0 0\n'
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"material_id": ["mp-1"], "cif": [text]}), stream)
    elif kind == "pickle":
        return pickle.dumps([("mp-1", text)])
    else:
        return text.encode()
    return stream.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_told_by_its_content(tmp_path: Path, fixtures: Path, kind: str) -> None:
    content = _content(kind, (fixtures / "data" / "rocksalt.cif").read_text())
    packers = [bytes, gzip.compress, lzma.compress] if kind in COMPRESSED else [bytes]
    for number, pack in enumerate(packers):
        path = tmp_path / f"structures{number}.dat"
        path.write_bytes(pack(content))
        assert recognise(path) == kind
        counts: list[int] = []
        (record,) = read_records(path, counts.append)
        assert record.problem is None
        assert record.id == ("structures" + str(number) + ".dat" if kind == "cif" else "mp-1")
        assert record.form == ("extxyz" if kind == "extxyz" else "cif")
        assert sum(counts) == input_bytes(path) == path.stat().st_size
        assert min(counts) > 0


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"cif"}))
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, kind: str) -> None:
    text = "data_x\n" + "".join(f"# {i * 7919}\n" for i in range(3000))
    content = _content(kind, text)
    packers = [bytes, gzip.compress, lzma.compress] if kind in COMPRESSED else [bytes]
    for pack in packers:
        packed = pack(content)
        # A table of texts that is cut at a line's end cannot be told from a shorter one.
        for end in {len(packed) - 1, len(packed) // 2, 20} if pack is not bytes else {len(packed) // 2}:
            path = tmp_path / f"x.{kind}"
            path.write_bytes(packed[:end])
            with pytest.raises(DataError) as caught:
                list(read_records(path))
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_the_bytes_of_a_folder_add_up(tmp_path: Path) -> None:
    for name in ("a.cif", "sub/b.cif", "sub/c.cif.gz", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = b"data_x\n" * 100
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    counts: list[int] = []
    assert [r.id for r in read_records(tmp_path, counts.append)] == ["a", "sub/b", "sub/c"]
    assert sum(counts) == input_bytes(tmp_path) > 1400
    with pytest.raises(DataError, match="no file or folder"):
        input_bytes(tmp_path / "nowhere")


def test_ids_need_not_be_unique(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(_csv_text([["id", "cif"], ["a", "data_a"], ["a", "data_b"], ["", "data_c"]]))
    assert [r.id for r in read_records(path)] == ["a", "a", "3"]


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "LARGEST_TEXT", 2000)
    path = tmp_path / "x.csv"
    path.write_text('id,cif\n1,data_a\n2,"data_b\n' + "more,of,it\n" * 2000)
    with pytest.raises(DataError, match="check its quotes"):
        list(read_records(path))


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.cif files in the folder"):
        read_records(tmp_path)


def test_real_crystals(crystals: Path) -> None:
    records = list(read_records(crystals / "carbon_24" / "val.csv.gz"))
    assert len(records) == len({r.id for r in records}) == 300
    assert all(r.text.startswith("# generated") for r in records)


@pytest.mark.parametrize("columns", [",CIF", ";cif", "\tcif_text"])
def test_a_table_of_cifs_is_not_read_as_one_cif(tmp_path: Path, fixtures: Path, columns: str) -> None:
    text = (fixtures / "data" / "rocksalt.cif").read_text()
    path = tmp_path / "crystals.csv"
    path.write_text(f'_id{columns}\n1{columns[0]}"{text}"\n')
    with pytest.raises(DataError, match="no column 'cif'"):
        read_records(path)


def test_a_cif_may_begin_with_comments(tmp_path: Path, fixtures: Path) -> None:
    path = tmp_path / "crystal"
    path.write_text(
        "\n# a comment, _cell_length_a\r\n  #\n" + (fixtures / "data" / "rocksalt.cif").read_text()
    )
    assert recognise(path) == "cif"


def test_a_link_to_nothing_is_a_record_that_cannot_be_read(tmp_path: Path, fixtures: Path) -> None:
    (tmp_path / "good.cif").write_text((fixtures / "data" / "rocksalt.cif").read_text())
    (tmp_path / "away.cif").symlink_to("nowhere.cif")
    (tmp_path / "ring.cif").symlink_to("ring.cif")
    problems = {record.id: record.problem for record in read_records(tmp_path)}
    assert problems["good"] is None
    assert "cannot be read" in (problems["away"] or "")
    assert "cannot be read" in (problems["ring"] or "")
    assert input_bytes(tmp_path) > 0


def test_names_of_blocks_have_no_control_characters(tmp_path: Path, fixtures: Path) -> None:
    text = (fixtures / "data" / "rocksalt.cif").read_text()
    block = text[text.index("data_") :]
    name = block.split(maxsplit=1)[0]
    path = tmp_path / "two.cif"
    path.write_text(block.replace(name, "data_\x1b[31m") + "\n" + block)
    assert next(read_records(path)).id == "two#\\x1b[31m"


def test_a_link_to_a_folder_is_counted_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.cif").write_text("data_a\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.cif").write_text("data_b\n")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    fine, linked = read_records(tmp_path / "in")
    assert (fine.id, linked.id) == ("a", "more")
    assert linked.problem is not None
    assert "is a link to a folder" in linked.problem
