"""Files and folders that appear when they are whole, and locks."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crystallm_jax.errors import DataError
from crystallm_jax.files import (
    digest_of,
    holder_of,
    lock,
    new_file,
    new_folder,
    remove_leftovers,
    sign,
)

# Writes half of a file and dies.
_KILLED = """
import os, signal, sys
from pathlib import Path
from crystallm_jax.files import new_file

with new_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_what_was_there_and_a_name_that_is_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("whole")
    done = subprocess.run([sys.executable, "-c", _KILLED, path], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2
    kept = [tmp_path / name for name in ("mine.partial", ".mine.partial", ".figures.json.12345.partial")]
    for of_a_user in kept:
        of_a_user.touch()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {path, *kept}


@pytest.mark.parametrize("synced", [True, False])
def test_a_file_appears_when_it_is_whole(tmp_path: Path, synced: bool) -> None:
    path = tmp_path / "folder" / "file"
    with new_file(path, synced=synced) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with contextlib.suppress(ZeroDivisionError), new_file(path, synced=synced) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with contextlib.suppress(ZeroDivisionError), new_folder(path) as partial:
        (partial / "file").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_folder(path) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").touch()
        assert not path.exists()
    assert list(tmp_path.rglob("*")) == [path, path / "inner", path / "inner" / "file"]


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "file") as partial:
            partial.touch()
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "folder": 0o750}


def test_what_goes_wrong_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file" / "inside"
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"inside: cannot be written: File exists; give another --out"),
        new_file(path, DataError, mend="; give another --out"),
    ):
        pass


def test_one_process_holds_a_file_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with path.open("a+") as first, path.open("a+") as second:
        assert lock(first)
        sign(first)
        assert not lock(second)
        assert holder_of(second).startswith(f"process {os.getpid()} on ")
    with path.open("a+") as third:
        assert lock(third)


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert digest_of(path).startswith("ba7816bf8f01cfea")
    assert digest_of(path, "md5") == "900150983cd24fb0d6963f7d28e17f72"
