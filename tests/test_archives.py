"""Archives: their CIFs are read in memory; what points out of one, or is no plain file, is refused."""

import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crystallm_jax.data import Record, read_records
from crystallm_jax.data.reading import archives
from crystallm_jax.errors import DataError

TEXT = "data_NaCl\n_cell_length_a 4\n"
EVIL = ["../a.cif", "x/../../a.cif", "/etc/a.cif", "\\a.cif", "C:\\a.cif", "c:a.cif", "x\\..\\a.cif", ".."]


def _tar(path: Path, members: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


PACKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {"tar": _tar, "zip": _zip}
MEMBERS = {
    "set/b.cif": TEXT.encode(),
    "set/notes.txt": b"no crystal",
    "set/._b.cif": b"\x00\x05\x16\x07",
    "./a.cif.gz": gzip.compress(TEXT.encode()),
    "bad.cif": b"data_\xff",
    "empty.CIF": b"",
}


@pytest.mark.parametrize("kind", PACKERS)
def test_cifs_are_read_in_the_archives_order(tmp_path: Path, kind: str) -> None:
    first, second, bad, empty = read_records(PACKERS[kind](tmp_path / f"x.{kind}", MEMBERS))
    assert first == Record("set/b", TEXT)
    assert second == Record("a", TEXT)
    assert bad.id == "bad"
    assert "the member 'bad.cif' is not UTF-8" in str(bad.problem)
    assert empty.id == "empty"
    assert "is empty" in str(empty.problem)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar(tmp_path: Path, mode: str, form: int) -> None:
    long = "d" * 90 + "/" + "n" * 90 + ".cif"
    other = {"é.cif": b"data_a"} if form != tarfile.USTAR_FORMAT else {"e.cif": b"data_a"}
    path = _tar(tmp_path / "x.tar", {long: TEXT.encode(), **other}, mode, form)
    ids = [record.id for record in read_records(path)]
    assert ids == [long.removesuffix(".cif"), next(iter(other)).removesuffix(".cif")]


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("name", EVIL)
def test_members_that_point_out_of_the_archive_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = PACKERS[kind](tmp_path / f"x.{kind}", {"fine.cif": TEXT.encode(), name: TEXT.encode()})
    with pytest.raises(DataError, match="points out of the archive: refused") as caught:
        list(read_records(path))
    assert repr(name)[1:-1].replace("\\\\", "\\")[:2] in str(caught.value).replace("\\\\", "\\")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "no plain file"),
        (tarfile.BLKTYPE, "no plain file"),
        (tarfile.FIFOTYPE, "no plain file"),
        (tarfile.GNUTYPE_SPARSE, "no plain file"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes, what: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("link.cif")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=f"'link.cif' is {what}: refused"):
        list(read_records(path))


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link.cif")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"'link.cif' is a link: refused"):
        list(read_records(path))


@pytest.mark.parametrize("kind", PACKERS)
def test_an_archive_without_cifs(tmp_path: Path, kind: str) -> None:
    path = PACKERS[kind](tmp_path / f"x.{kind}", {"a.txt": b"a", "b.csv": b"id,cif"})
    with pytest.raises(DataError, match=r"holds no \.cif file \(2 others\)"):
        list(read_records(path))


@pytest.mark.parametrize("kind", PACKERS)
def test_members_that_are_too_large_are_handed_on_with_their_problem(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LARGEST_TEXT", 1000)
    members = {"large.cif": TEXT.encode() * 100, "fine.cif": TEXT.encode()}
    large, fine = read_records(PACKERS[kind](tmp_path / f"x.{kind}", members))
    assert "no single crystal" in str(large.problem)
    assert fine == Record("fine", TEXT)


def test_a_bomb_in_a_member_is_not_unpacked(tmp_path: Path) -> None:
    bomb = lzma.compress(bytes(200 * 2**20), preset=0)
    path = _tar(tmp_path / "x.tar", {"bomb.cif.xz": bomb})
    tracemalloc.start()
    (record,) = read_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "holds over 64 MiB" in str(record.problem)
    assert peak < 200 * 2**20


def test_damaged_members_of_a_zip_are_handed_on_with_their_problem(tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a.cif": TEXT.encode() * 50, "b.cif": TEXT.encode()})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[0].header_offset + 30 + len("a.cif")
    data[start + 5] ^= 0xFF
    path.write_bytes(data)
    broken, fine = read_records(path)
    assert "the member 'a.cif' cannot be read" in str(broken.problem)
    assert fine == Record("b", TEXT)
    data[start + 5] ^= 0xFF
    for offset in (6, data.index(b"PK\x01\x02") + 8):  # the bit that says encrypted
        data[offset] |= 1
    path.write_bytes(data)
    assert "it is encrypted" in str(next(read_records(path)).problem)


def test_a_header_of_any_length_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("long")
        info.type, info.size = kind, 2**33
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
        with pytest.raises(DataError, match="a header of 8,589,934,592 bytes"):
            list(read_records(path))


@pytest.mark.parametrize(
    "fields", [b"99 path=x\n", b"x path=y\n", b"3 a=b\n", b"12 path", b"16 GNU.sparse=1\n"]
)
def test_broken_extended_headers(tmp_path: Path, fields: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(fields)
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + fields.ljust(512, b"\0") + bytes(1024))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(path))


def test_an_extended_header_names_the_member_and_its_size(tmp_path: Path) -> None:
    fields = b"20 path=../out.cif\n\n"[:19] + b"\n"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(fields)
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo("fine.cif").tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + fields.ljust(512, b"\0") + member + bytes(1024))
    with pytest.raises(DataError, match="points out of the archive"):
        list(read_records(path))


def test_a_tar_without_its_end_is_cut_short(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar", {"a.cif": TEXT.encode(), "b.cif": TEXT.encode()})
    path.write_bytes(path.read_bytes()[:2048])
    records = read_records(path)
    assert next(records) == Record("a", TEXT)
    with pytest.raises(DataError, match="check that it is whole"):
        list(records)


def test_a_long_tar_is_read_in_little_memory(tmp_path: Path) -> None:
    path = _tar(tmp_path / "x.tar.gz", {f"{i}.cif": TEXT.encode() for i in range(6_000)}, "w:gz")
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 6_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_zip_that_lies_about_its_directory(tmp_path: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a.cif": TEXT.encode()})
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 20] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(DataError, match="check that it is whole"):
        list(read_records(path))
