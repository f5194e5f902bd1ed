"""Published archives are unpacked whole, inside their folder, or not at all."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crystallm_jax.artifacts import checkpoint_of, unpack
from crystallm_jax.errors import DataError

EVIL = ("../out.cif", "a/../../out.cif", "/etc/out.cif", "C:\\out.cif", "a\\..\\..\\out.cif")
FILES = {"set/a.cif": b"data_a", "set/deep/b.cif": b"data_b", "set/empty": b""}


def _tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in others:
            archive.addfile(info)
    return path


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


PACKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {"x.tar.gz": _tar, "x.zip": _zip}
either = pytest.mark.parametrize("packed", PACKERS)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _refused(archive: Path, folder: Path, words: str) -> None:
    """Refused in one line, with nothing left behind."""
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(DataError, match=words) as caught:
        unpack(archive, folder)
    assert "\n" not in str(caught.value)
    assert str(archive) in str(caught.value)
    assert sorted(archive.parent.rglob("*")) == before


@either
def test_an_archive_is_unpacked_and_its_one_folder_is_not_repeated(tmp_path: Path, packed: str) -> None:
    archive = PACKERS[packed](tmp_path / packed, FILES)
    read: list[int] = []
    unpack(archive, tmp_path / "new" / "mine", on_bytes=read.append)
    assert _contents(tmp_path / "new" / "mine") == {
        name.removeprefix("set/"): data for name, data in FILES.items()
    }
    assert [item.name for item in (tmp_path / "new").iterdir()] == ["mine"]
    assert 0 < sum(read) <= archive.stat().st_size


@either
def test_several_things_at_the_top_stay_as_they_are(tmp_path: Path, packed: str) -> None:
    files = {**FILES, "notes.txt": b"notes"}
    unpack(PACKERS[packed](tmp_path / packed, files), tmp_path / "mine")
    assert _contents(tmp_path / "mine") == files


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.tar.gz", FILES)
    (tmp_path / "mine").mkdir()
    unpack(archive, tmp_path / "mine")
    with pytest.raises(DataError, match="mine: is there already"):
        unpack(archive, tmp_path / "mine")
    assert len(_contents(tmp_path / "mine")) == 3
    with pytest.raises(DataError, match=r"x\.tar\.gz: is there already"):
        unpack(archive, archive)


@either
@pytest.mark.parametrize("name", EVIL)
def test_a_member_that_would_leave_the_folder_is_refused(tmp_path: Path, packed: str, name: str) -> None:
    archive = PACKERS[packed](tmp_path / packed, {**FILES, name: b"evil"})
    _refused(archive, tmp_path / "mine", "points out of the archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("set/link")
    info.type, info.linkname = kind, "/etc"
    _refused(_tar(tmp_path / "x.tar.gz", FILES, info), tmp_path / "mine", "is a link|is no plain file")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("set/link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc")
    _refused(tmp_path / "x.zip", tmp_path / "mine", "is a link")


@either
def test_a_bomb_is_refused_before_it_fills_the_disk(
    tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crystallm_jax.artifacts.unpacking._FREE_EXPANSION", 0)
    archive = PACKERS[packed](tmp_path / packed, {"set/zeros": bytes(2**21)})
    _refused(archive, tmp_path / "mine", "over 100 times its size")


def test_empty_files_without_end_are_a_bomb_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crystallm_jax.artifacts.unpacking._FREE_EXPANSION", 0)
    monkeypatch.setattr("crystallm_jax.artifacts.unpacking._MOST_EXPANSION", 10)
    archive = _tar(tmp_path / "x.tar.gz", {f"set/{number}": b"" for number in range(300)})
    _refused(archive, tmp_path / "mine", "over 10 times its size")


@either
def test_two_members_of_one_name_are_refused(tmp_path: Path, packed: str) -> None:
    archive = PACKERS[packed](tmp_path / packed, {"set/a": b"one", "set//a": b"other"})
    _refused(archive, tmp_path / "mine", "two members want to be")
    archive.unlink()
    archive = PACKERS[packed](tmp_path / packed, {"set/a": b"a file", "set/a/b": b"in it"})
    _refused(archive, tmp_path / "mine", "cannot be unpacked|two members")


@either
@pytest.mark.parametrize("name", ["n" * 300, ".", ""], ids=["long", "dot", "none"])
def test_names_that_no_file_can_have_are_one_line(tmp_path: Path, packed: str, name: str) -> None:
    archive = PACKERS[packed](tmp_path / packed, {"a": b"fine", name: b"bad"})
    _refused(archive, tmp_path / "mine", "cannot be unpacked|two members|without a name")


@either
def test_a_damaged_archive_is_refused(tmp_path: Path, packed: str) -> None:
    archive = PACKERS[packed](tmp_path / packed, {"set/a": b"a crystal" * 5000})
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive", whole[:60] + b"damage" + whole[66:]):
        archive.write_bytes(damaged)
        _refused(archive, tmp_path / "mine", "cannot be")


def test_an_archive_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        unpack(tmp_path / "none.tar.gz", tmp_path / "mine")
    with pytest.raises(DataError, match="No such file"):
        checkpoint_of(tmp_path / "none.tar.gz", tmp_path / "ckpt.pt")


def test_the_checkpoint_of_a_published_model_is_taken_from_its_archive(tmp_path: Path) -> None:
    files = {"model/._ckpt.pt": b"shadow", "model/ckpt.pt": b"weights", "model/config.yaml": b"{}"}
    archive = _tar(tmp_path / "x.tar.gz", files)
    out = tmp_path / "models" / "model.pt"
    assert checkpoint_of(archive, out) == out
    assert out.read_bytes() == b"weights"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model/weights.bin": b""}, "holds none, where one ckpt.pt"),
        ({"a/ckpt.pt": b"1", "b/ckpt.pt": b"2"}, "holds 2: a/ckpt.pt, b/ckpt.pt, where one"),
        ({"ckpt.pt": b"1", "../ckpt.pt": b"2"}, "points out of the archive"),
    ],
)
def test_an_archive_without_one_checkpoint_is_refused(
    tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    archive = _tar(tmp_path / "x.tar.gz", files)
    with pytest.raises(DataError, match=words):
        checkpoint_of(archive, tmp_path / "ckpt.pt")
    assert list(tmp_path.iterdir()) == [archive]
