"""The catalogue: all or nothing of a batch, and a run that was killed goes on behind the last one."""

from pathlib import Path

import pytest

from crystallm_jax.data.preparing.catalogue import Catalogue, Row
from crystallm_jax.data.preparing.pipeline import Dropped, Key, Prepared
from crystallm_jax.errors import DataError

PLAN = {"inputs": ["a.csv"], "symprec": 0.1}


def _kept(name: str, payload: bytes) -> Row:
    return Row(0, name, Prepared(payload, Key("Na4Cl4", "Fm-3m", "Cl1Na1", 4, 180.0)))


def _abandon(catalogue: Catalogue) -> None:
    """Leave as a killed process does: nothing is removed."""
    catalogue._close()


def _rows(catalogue: Catalogue) -> list[tuple]:
    return catalogue.connection.execute("SELECT place, id, stage, offset, length FROM records").fetchall()


def test_rows_and_payload_are_there_again(tmp_path: Path) -> None:
    first = Catalogue(tmp_path / "work", PLAN)
    first.append([_kept("a", b"xy"), Row(0, "b", Dropped("parse", "no")), _kept("c", b"zuv")])
    _abandon(first)
    with Catalogue(tmp_path / "work", PLAN) as again:
        assert len(again) == 3
        assert not again.begun_anew
        again.append([_kept("d", b"w")])
        assert _rows(again) == [
            (0, "a", None, 0, 2),
            (1, "b", "parse", None, None),
            (2, "c", None, 2, 3),
            (3, "d", None, 5, 1),
        ]
        assert again.read(0, 99) == b"xyzuvw"
    assert not (tmp_path / "work").exists()


def test_what_a_kill_left_behind_the_last_batch_is_cut_off(tmp_path: Path) -> None:
    first = Catalogue(tmp_path, PLAN)
    first.append([_kept("a", b"xy")])
    _abandon(first)
    with (tmp_path / "payload.bin").open("ab") as stream:
        stream.write(b"half a batch")
    (tmp_path / ".train.bin.0123abcd.partial").write_bytes(b"half a result")
    again = Catalogue(tmp_path, PLAN)
    again.append([_kept("b", b"z")])
    assert again.read(0, 99) == b"xyz"
    assert not (tmp_path / ".train.bin.0123abcd.partial").exists()
    _abandon(again)


def test_another_plan_begins_anew(tmp_path: Path) -> None:
    first = Catalogue(tmp_path / "work", PLAN)
    first.append([_kept("a", b"xy")])
    _abandon(first)
    again = Catalogue(tmp_path / "work", PLAN | {"symprec": 0.01})
    assert again.begun_anew
    assert len(again) == 0
    assert again.read(0, 99) == b""
    _abandon(again)


def _append_and_fail(catalogue: Catalogue) -> None:
    catalogue.append([_kept("a", b"xy")])
    raise ZeroDivisionError


def test_an_error_keeps_what_is_done_and_an_empty_folder_goes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Catalogue(tmp_path / "out" / "work", PLAN):
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    with pytest.raises(ZeroDivisionError), Catalogue(tmp_path / "work", PLAN) as catalogue:
        _append_and_fail(catalogue)
    with Catalogue(tmp_path / "work", PLAN) as again:
        assert len(again) == 1


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with Catalogue(tmp_path / "work", PLAN) as catalogue:
        catalogue.append([_kept("a", b"xy")])
        with pytest.raises(DataError, match="another 'prepare' writes to"):
            Catalogue(tmp_path / "work", PLAN)


def test_a_damaged_catalogue_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "catalogue.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(DataError, match=r"is damaged .*remove it"):
        Catalogue(tmp_path, PLAN)


def test_a_full_disk_is_one_line_and_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(tmp_path, PLAN)
    catalogue.append([_kept("a", b"xy")])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            catalogue.append([_kept("b", b"z")])
    _abandon(catalogue)
    again = Catalogue(tmp_path, PLAN)
    assert len(again) == 1
    again.append([_kept("c", b"w")])
    assert again.read(0, 99) == b"xyw"
    _abandon(again)
