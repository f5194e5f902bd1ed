"""Published token folders and archives: they train as they are, and a wrong or hostile one is refused."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.data import Record, TokenStore, published_tokens
from crystallm_jax.data.published_tokens import read_token_records, token_archive_splits
from crystallm_jax.data.reading import tokenfiles
from crystallm_jax.data.reading.tokenfiles import unpacked_folder
from crystallm_jax.data.store import find_starts
from crystallm_jax.errors import DataError

TEXTS = [
    f"data_{formula}\n_cell_length_a {a}\n\n"
    for formula, a in (("Na4Cl4", 5.6), ("O2", 1.25), ("Cs1Cl1", 4.1), ("Fe2", 2.8))
]


def _tokens(texts: list[str]) -> np.ndarray:
    return np.concatenate([CIFTokenizer().encode_cif(text) for text in texts]).astype("<u2")


def _meta() -> dict[str, Any]:
    tokenizer = CIFTokenizer()
    return {
        "vocab_size": tokenizer.vocab_size,
        "itos": dict(tokenizer.id_to_token),
        "stoi": dict(tokenizer.token_to_id),
    }


def _files() -> dict[str, bytes]:
    return {
        "train.bin": _tokens(TEXTS[:3]).tobytes(),
        "val.bin": _tokens(TEXTS[3:]).tobytes(),
        "meta.pkl": pickle.dumps(_meta()),
    }


def _folder(folder: Path, **more: object) -> Path:
    folder.mkdir()
    for name, data in _files().items():
        (folder / name).write_bytes(data)
    for name, value in more.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(value))
    return folder


def _archive(path: Path, files: dict[str, bytes], *, inside: str = "tokens_x/") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(inside + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _starts() -> list[int]:
    return [int(start) for start in find_starts(_tokens(TEXTS[:3]))]


def test_a_published_folder_opens_as_it_is(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "tokens", starts=_starts(), starts_val=[0])
    store, val = TokenStore.open(folder), TokenStore.open(folder, "val")
    assert [store.text(i) for i in range(len(store))] == TEXTS[:3]
    assert [val.text(i) for i in range(len(val))] == TEXTS[3:]
    assert store.starts.dtype == np.int64
    assert store.header.format == 0
    assert store.header.splits["train"].records == 3


def test_starts_are_those_of_the_pickle_where_there_is_one(tmp_path: Path) -> None:
    some = _starts()[:1] + _starts()[2:]
    folder = _folder(tmp_path / "tokens", starts=some)
    assert TokenStore.open(folder).starts.tolist() == some
    (folder / "starts.pkl").unlink()
    assert TokenStore.open(folder).starts.tolist() == _starts()


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([], "holds no offsets"),
        ([0, 0], "rising offsets of 'data_'"),
        ([-1, 0], "rising offsets of 'data_'"),
        ([0, 10**6], "rising offsets of 'data_'"),
        ([0, 1], "rising offsets of 'data_'"),
        ([0, 2**62], "rising offsets of 'data_'"),
        (["0"], "whole numbers"),
        ({0: 1}, "whole numbers"),
        ([np.int64(0)], "whole numbers"),
    ],
)
def test_wrong_starts_are_refused(tmp_path: Path, starts: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"starts\.pkl.*{message}"):
        TokenStore.open(_folder(tmp_path / "tokens", starts=starts))


def test_under_represented_records_of_a_published_folder(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "tokens", starts=_starts(), starts_underrep=_starts()[1:])
    marked = TokenStore.open(folder).underrepresented
    assert marked.dtype == np.int64
    assert marked.tolist() == _starts()[1:]
    with pytest.raises(DataError, match=r"no under-represented records in 'val': .*--underrepresented"):
        _ = TokenStore.open(folder, "val").underrepresented
    for wrong in (_starts()[1:][::-1], [1]):
        (folder / "starts_underrep.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(DataError, match="rising offsets"):
            _ = TokenStore.open(folder).underrepresented
    (folder / "starts_underrep.pkl").write_bytes(pickle.dumps(_starts()[1:]))
    (folder / "starts.pkl").write_bytes(pickle.dumps(_starts()[:2]))
    with pytest.raises(DataError, match="rising starts of records"):
        _ = TokenStore.open(folder).underrepresented


def _swapped(meta: dict[str, Any]) -> dict[str, Any]:
    meta["stoi"]["Na"], meta["stoi"]["K"] = meta["stoi"]["K"], meta["stoi"]["Na"]
    return meta


def _longer(meta: dict[str, Any]) -> dict[str, Any]:
    meta["stoi"]["<pad>"] = meta["itos"][371] = 371
    return meta


def _renamed(meta: dict[str, Any]) -> dict[str, Any]:
    meta["itos"][5] = "something"
    return meta


def _shorter(meta: dict[str, Any]) -> dict[str, Any]:
    del meta["stoi"]["<unk>"]
    return meta


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (_swapped(_meta()), r"token \d+ is '\w+' there and '\w+' here"),
        (_renamed(_meta()), "token 5 is 'something' there"),
        (_longer(_meta()), "has 372 tokens where 371 are known"),
        (_shorter(_meta()), "token 370 is missing there and '<unk>' here"),
        (_meta() | {"vocab_size": 50_304}, "tokens where 371"),
        (_meta() | {"stoi": None}, "no 'stoi' and 'itos'"),
        ([1, 2], "no 'stoi' and 'itos'"),
        (_meta() | {"itos": {True: [[]]}}, "token 0 is missing"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path: Path, meta: object, message: str) -> None:
    folder = _folder(tmp_path / "tokens", meta=meta)
    with pytest.raises(DataError, match=message):
        TokenStore.open(folder)
    path = _archive(tmp_path / "tokens_x.tar.gz", _files() | {"meta.pkl": pickle.dumps(meta)})
    with pytest.raises(DataError, match=message):
        token_archive_splits(path)


def test_space_groups_may_be_named_with_their_mark(tmp_path: Path) -> None:
    meta = _meta()
    meta["itos"] = {number: token for token, number in meta["stoi"].items()}
    assert len(TokenStore.open(_folder(tmp_path / "tokens", meta=meta))) == 3


def test_a_hostile_vocabulary_is_not_run(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "tokens")
    (folder / "meta.pkl").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    with pytest.raises(DataError, match=r"it wants 'os\.system'"):
        TokenStore.open(folder)


@pytest.mark.parametrize("inside", ["", "tokens_x/", "./"])
def test_a_published_archive_opens_as_it_is(tmp_path: Path, inside: str) -> None:
    files = _files() | {"starts.pkl": pickle.dumps(_starts()), "README": b"not wanted"}
    path = _archive(tmp_path / "tokens_x.tar.gz", files, inside=inside)
    store = TokenStore.open(path)
    assert store.folder == tmp_path / "tokens_x.unpacked"
    assert [store.text(i) for i in range(3)] == TEXTS[:3]
    assert TokenStore.open(path, "val").text(0) == TEXTS[3]
    expected = {"train.bin", "val.bin", "meta.pkl", "starts.pkl", "unpacked.json"}
    assert {file.name for file in store.folder.iterdir()} == expected
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "tokens_x.unpacked"}
    umask = os.umask(0)
    os.umask(umask)
    assert store.folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_archive_is_unpacked_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = _archive(tmp_path / "tokens_x.tar.gz", _files())
    folder = unpacked_folder(path)
    before = (folder / "train.bin").stat()
    assert unpacked_folder(path) == folder
    assert (folder / "train.bin").stat() == before
    (folder / "val.bin").unlink()
    assert (unpacked_folder(path) / "val.bin").is_file()
    _archive(path, _files() | {"train.bin": _tokens(TEXTS).tobytes()})
    assert len(TokenStore.open(path)) == 4
    assert {file.name for file in tmp_path.iterdir()} == {path.name, folder.name}


def test_files_that_a_user_put_beside_unpacked_ones_are_kept(tmp_path: Path) -> None:
    path = _archive(tmp_path / "tokens_x.tar.gz", _files())
    (unpacked_folder(path) / "starts.pkl").write_bytes(pickle.dumps(_starts()[:2]))
    assert len(TokenStore.open(path)) == 2
    os.utime(path, ns=(0, 12345))
    assert len(TokenStore.open(path)) == 3
    assert (tmp_path / "tokens_x.unpacked.old1" / "starts.pkl").is_file()


def test_a_folder_that_is_in_the_way_is_not_touched(tmp_path: Path) -> None:
    path = _archive(tmp_path / "tokens_x.tar.gz", _files())
    (tmp_path / "tokens_x.unpacked").mkdir()
    (tmp_path / "tokens_x.unpacked" / "mine").write_text("mine")
    with pytest.raises(DataError, match="is in the way"):
        TokenStore.open(path)
    assert (tmp_path / "tokens_x.unpacked" / "mine").read_text() == "mine"


def test_another_process_may_be_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _archive(tmp_path / "tokens_x.tar.gz", _files())
    unpack = tokenfiles._unpack

    def slowly(archive: Path, folder: Path) -> set[str]:
        monkeypatch.setattr(tokenfiles, "_unpack", unpack)
        unpacked_folder(archive)
        return unpack(archive, folder)

    monkeypatch.setattr(tokenfiles, "_unpack", slowly)
    assert len(TokenStore.open(path)) == 3
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "tokens_x.unpacked"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../train.bin": b"\x01\x00"}, "points out of the archive"),
        ({"train.bin": b"\x01\x00", "/val.bin": b"\x01\x00"}, "points out of the archive"),
        ({"train.bin": b"\x01\x00", "sub/train.bin": b"\x01\x00"}, r"two files 'train\.bin'"),
        ({"meta.pkl": b""}, r"holds no train\.bin"),
        ({"train.bin": bytes(2**20)}, "refused as a bomb"),
    ],
)
def test_archives_that_are_refused_leave_nothing(
    tmp_path: Path, files: dict[str, bytes], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenfiles, "_ALLOWANCE", 0)
    path = _archive(tmp_path / "tokens_x.tar.gz", files, inside="")
    with pytest.raises(DataError, match=message):
        TokenStore.open(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_place_of_the_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens_x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("train.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    for read in (TokenStore.open, token_archive_splits):
        with pytest.raises(DataError, match="is a link: refused"):
            read(path)


def test_damaged_archives_and_files_that_are_none(tmp_path: Path) -> None:
    path = _archive(tmp_path / "tokens_x.tar.gz", _files())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="check that it is whole"):
        TokenStore.open(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="no prepared folder and no token archive"):
        TokenStore.open(path)
    assert list(tmp_path.iterdir()) == [path]


def test_splits_of_folders_archives_and_other_things(tmp_path: Path) -> None:
    assert token_archive_splits(_folder(tmp_path / "tokens")) == ("train", "val")
    assert token_archive_splits(_archive(tmp_path / "a.tar.gz", _files())) == ("train", "val")
    assert token_archive_splits(_archive(tmp_path / "b.tar.gz", {"x.cif": b"", "train.bin": b""})) == ()
    assert token_archive_splits(_archive(tmp_path / "c.tar.gz", {"x.txt": b""})) == ()
    assert token_archive_splits(tmp_path) == ()
    assert token_archive_splits(tmp_path / "nowhere") == ()
    (tmp_path / "x.csv").write_text("id,cif\n")
    assert token_archive_splits(tmp_path / "x.csv") == ()
    with pytest.raises(DataError, match="no split 'test'"):
        list(read_token_records(tmp_path / "a.tar.gz", "test"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_records_of_an_archive_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(published_tokens, "_CHUNK", chunk)
    path = _archive(tmp_path / "tokens_x.tar.gz", _files())
    expected = [Record(str(i), text) for i, text in enumerate(TEXTS[:3])]
    assert list(read_token_records(path, "train")) == expected
    assert list(read_token_records(path, "val")) == [Record("0", TEXTS[3])]
    assert list(read_token_records(_folder(tmp_path / "tokens"), "train")) == expected
    assert list(tmp_path.glob("*.unpacked")) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no whole number"),
        (_tokens(TEXTS[:1]).tobytes() + b"\x00", "no whole number"),
        (_tokens(["_cell_length_a 5\n\n" + TEXTS[0]]).tobytes(), "does not begin with 'data_'"),
        (_tokens(["_cell_length_a 5\n\n"]).tobytes(), "no record starts"),
        (np.append(_tokens(TEXTS[:1]), 40_000).astype("<u2").tobytes(), "record 0: token id 40000"),
    ],
)
def test_streams_that_are_no_cif_tokens(tmp_path: Path, data: bytes, message: str) -> None:
    path = _archive(tmp_path / "tokens_x.tar.gz", {"train.bin": data})
    with pytest.raises(DataError, match=message):
        list(read_token_records(path, "train"))
