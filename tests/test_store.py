"""The token store: what is written is read again, and nothing half-written or foreign is taken for one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.data import TokenStore, store
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.errors import DataError

TEXTS = [
    f"data_{formula}\n_cell_length_a {a}\n\n"
    for formula, a in (("Na4Cl4", 5.6), ("O2", 1.25), ("Cs1Cl1", 4.1))
]
EMPTY = {"sources": ("x.csv",), "options": {}, "counts": {}, "versions": {}}


def _write(folder: Path, texts: list[str] = TEXTS, splits: dict[str, list[int]] | None = None) -> None:
    tokenizer = CIFTokenizer()
    splits = {"train": list(range(len(texts)))} if splits is None else splits
    with StoreWriter(folder) as out:
        for split, rows in splits.items():
            for i in rows:
                out.add(f"id-{i}", tokenizer.encode_cif(texts[i]), split=split)
        out.drop("bad", "parse", "no structure, at all")
        out.commit(**EMPTY)


def _interrupted(folder: Path) -> None:
    with StoreWriter(folder) as out:
        out.add("x", np.array([1, 2]))
        raise ZeroDivisionError


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    _write(tmp_path / "deep" / "er")
    opened = TokenStore.open(tmp_path / "deep" / "er")
    assert len(opened) == 3
    assert opened.ids == ("id-0", "id-1", "id-2")
    assert [opened.text(i) for i in range(3)] == TEXTS
    assert opened.text(-1) == TEXTS[2]
    assert opened.record(1).dtype == np.uint16
    assert opened.tokens.dtype == np.uint16
    assert not opened.tokens.flags.writeable
    assert opened.starts.dtype == np.int64
    split = opened.header.splits["train"]
    assert (split.records, split.tokens, split.unk) == (3, len(opened.tokens), 0)
    assert split.longest == max(len(opened.record(i)) for i in range(3))
    opened.verify()
    with pytest.raises(IndexError):
        opened.record(3)
    files = {p.name for p in (tmp_path / "deep" / "er").iterdir()}
    assert files == {"train.bin", "train.starts.npy", "train.ids.txt", "meta.json", "dropped.csv"}
    dropped = (tmp_path / "deep" / "er" / "dropped.csv").read_text()
    assert dropped == 'id,stage,reason\nbad,parse,"no structure, at all"\n'


def test_the_stream_is_raw_little_endian(tmp_path: Path) -> None:
    _write(tmp_path)
    ids = np.concatenate([CIFTokenizer().encode_cif(text) for text in TEXTS])
    assert (tmp_path / "train.bin").read_bytes() == ids.astype("<u2").tobytes()


def test_under_represented_records_are_marked(tmp_path: Path) -> None:
    tokenizer = CIFTokenizer()
    with StoreWriter(tmp_path) as out:
        for i, text in enumerate(TEXTS):
            out.add(str(i), tokenizer.encode_cif(text), underrepresented=i != 1)
        out.commit(**EMPTY)
    opened = TokenStore.open(tmp_path)
    assert opened.underrepresented.dtype == np.int64
    assert opened.underrepresented.tolist() == opened.starts[[0, 2]].tolist()
    path = tmp_path / "train.underrep.npy"
    for wrong, message in (
        (np.array([1]), "rising starts of records"),
        (opened.starts[[2, 0]], "rising starts of records"),
        (np.array([len(opened.tokens)]), "rising starts of records"),
        (np.array([0.0]), "does not hold"),
        (np.array([[0]]), "does not hold"),
        (np.empty(0, np.int64), "marks no under-represented records"),
    ):
        np.save(path, wrong)
        with pytest.raises(DataError, match=message):
            _ = TokenStore.open(tmp_path).underrepresented
    path.unlink()
    with pytest.raises(DataError, match=r"under-represented records in 'train'.*--underrepresented"):
        _ = TokenStore.open(tmp_path).underrepresented


def test_splits_share_the_records(tmp_path: Path) -> None:
    _write(tmp_path, splits={"train": [0, 2], "val": [1]})
    train, val = TokenStore.open(tmp_path), TokenStore.open(tmp_path, "val")
    assert [train.text(0), train.text(1), val.text(0)] == [TEXTS[0], TEXTS[2], TEXTS[1]]
    assert (train.ids, val.ids) == (("id-0", "id-2"), ("id-1",))
    train.verify()
    val.verify()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(DataError, match=r"no split 'test' \(it has: train, val\)"):
        TokenStore.open(tmp_path, "test")


def test_a_new_store_replaces_an_old_one_with_all_its_splits(tmp_path: Path) -> None:
    _write(tmp_path, splits={"train": [0, 2], "val": [1]})
    _write(tmp_path, TEXTS[1:2])
    assert len(TokenStore.open(tmp_path)) == 1
    assert not list(tmp_path.glob("val*"))


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _interrupted(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_old_store_as_it_was(tmp_path: Path) -> None:
    _write(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        _interrupted(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_files_that_prepare_did_not_write_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\x01\x00")
    with pytest.raises(DataError, match=r"already has a train.bin"):
        StoreWriter(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        StoreWriter(tmp_path / "train.bin")
    assert (tmp_path / "train.bin").read_bytes() == b"\x01\x00"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device") as caught:
        _write(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_published_files_alone_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.concatenate([CIFTokenizer().encode_cif(text) for text in TEXTS])
    (tmp_path / "train.bin").write_bytes(stream.astype("<u2").tobytes())
    whole = TokenStore.open(tmp_path)
    assert [whole.text(i) for i in range(len(whole))] == TEXTS
    assert whole.header.format == 0
    assert whole.ids == ("0", "1", "2")
    for piece in (1, 2, 3, 7):
        monkeypatch.setattr(store, "_SCAN_TOKENS", piece)
        assert store.find_starts(stream).tolist() == whole.starts.tolist()
    with pytest.raises(DataError, match="no checksum"):
        whole.verify()


@pytest.mark.parametrize("text", ["_cell_length_a 5\n\n", "Na\ndata_Na\n\n"])
def test_a_stream_without_starts_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.bin").write_bytes(CIFTokenizer().encode_cif(text).astype("<u2").tobytes())
    with pytest.raises(DataError, match="no record starts"):
        TokenStore.open(tmp_path)


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    stream = np.append(CIFTokenizer().encode_cif(TEXTS[0]), 50_000)
    (tmp_path / "train.bin").write_bytes(stream.astype("<u2").tobytes())
    with pytest.raises(DataError, match="holds the id 50000"):
        TokenStore.open(tmp_path)


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared folder"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no split 'train' \(it has: none\)"):
        TokenStore.open(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no whole number"):
        TokenStore.open(tmp_path)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_is_named(tmp_path: Path) -> None:
    _write(tmp_path)
    stream, starts = (tmp_path / "train.bin").read_bytes(), (tmp_path / "train.starts.npy").read_bytes()
    (tmp_path / "train.bin").write_bytes(stream[:-2])
    with pytest.raises(DataError, match=r"meta.json says .* truncated"):
        TokenStore.open(tmp_path)
    (tmp_path / "train.bin").write_bytes(stream[:-2] + b"\x00\x00")
    with pytest.raises(DataError, match="has changed since"):
        TokenStore.open(tmp_path).verify()
    (tmp_path / "train.starts.npy").write_bytes(starts[:100])
    with pytest.raises(DataError, match=r"starts.npy cannot be read"):
        TokenStore.open(tmp_path)
    np.save(tmp_path / "train.starts.npy", np.array([0, 5, 3]))
    with pytest.raises(DataError, match="rising offsets"):
        TokenStore.open(tmp_path)
    (tmp_path / "train.starts.npy").write_bytes(starts)
    (tmp_path / "train.ids.txt").write_text("one\n")
    with pytest.raises(DataError, match="1 ids for 3 records"):
        _ = TokenStore.open(tmp_path).ids


def test_foreign_headers_are_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    _edit(tmp_path, vocabulary_sha256="0" * 64)
    with pytest.raises(DataError, match="another vocabulary"):
        TokenStore.open(tmp_path)
    _edit(tmp_path, format=99)
    with pytest.raises(DataError, match="format 99"):
        TokenStore.open(tmp_path)
    _edit(tmp_path, splits={"train": {"rows": 1}})
    with pytest.raises(DataError, match="no header of a prepared folder"):
        TokenStore.open(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match="no header of a prepared folder"):
        TokenStore.open(tmp_path)


def test_a_pickle_in_place_of_the_offsets_is_not_run(tmp_path: Path) -> None:
    _write(tmp_path)
    np.save(tmp_path / "train.starts.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize(("place", "byte"), [(10, 1), (63, 76), (12, 0), (61, 40), (59, 44)])
def test_a_damaged_header_of_the_offsets_is_one_line(tmp_path: Path, place: int, byte: int) -> None:
    _write(tmp_path)
    path = tmp_path / "train.starts.npy"
    damaged = bytearray(path.read_bytes())
    damaged[place] = byte
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"prepare (the folder )?again"):
        TokenStore.open(tmp_path)
