"""The inputs of a preparation: what they are called, and what is no input of a folder's own making."""

import os
from pathlib import Path

import pytest

from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.inputs import Inputs
from crystallm_jax.data.preparing.pipeline import Recipe
from crystallm_jax.errors import DataError

ALONE = Execution(workers=0)
TEXTS = Recipe(stages=())


def _groups(path: Path) -> tuple[list[Path], list[Path], list[Path], list[Path]]:
    return [path], [], [], []


def test_what_a_run_would_replace_is_no_input_of_it(fixtures: Path, tmp_path: Path) -> None:
    texts, tokens = tmp_path / "texts", tmp_path / "tokens"
    prepare([fixtures / "data"], texts, recipe=TEXTS, execution=ALONE, progress=False)
    prepare([fixtures / "data"], tokens, execution=ALONE, progress=False)
    (tmp_path / "link").symlink_to(texts)
    for source, out in (
        (texts / "train.jsonl.gz", texts),
        (texts / "train.jsonl.gz", tmp_path / "link"),
        (tokens, tokens),
    ):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(DataError, match="is an input and would be replaced"):
            prepare([source], out, execution=ALONE, progress=False)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_files_of_a_folder_do_not_change_it(fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "salt.cif").write_text((fixtures / "data" / "rocksalt.cif").read_text())
    before = Inputs(_groups(tmp_path)).fingerprint()
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    (tmp_path / "out" / ".prepare" / "payload.bin").write_bytes(b"x")
    (tmp_path / "notes.txt").symlink_to("nowhere")
    assert Inputs(_groups(tmp_path)).fingerprint() == before
    (tmp_path / "salt.cif").write_text("data_other")
    assert Inputs(_groups(tmp_path)).fingerprint() != before


def test_names_that_are_no_unicode(fixtures: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"in\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("a file system of Unicode names alone")
    (folder / "salt.cif").write_text((fixtures / "data" / "rocksalt.cif").read_text())
    (folder / os.fsdecode(b"empty\xff\n.cif")).write_text("")
    report = prepare([folder], tmp_path / "out", execution=ALONE, progress=False)
    assert (report.n_kept, report.n_dropped) == (1, 1)
    assert "\\udcff" in (tmp_path / "out" / "meta.json").read_text()
    assert len((tmp_path / "out" / "dropped.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["meta.json", "dropped.csv", "val.ids.txt"])
def test_files_of_others_are_not_replaced(fixtures: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(DataError, match=f"already has a {name} that 'prepare' did not write"):
        prepare([fixtures / "data"], tmp_path, execution=ALONE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_kill_between_the_names_of_two_files_is_mended(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([fixtures / "data"], tmp_path / "whole", execution=ALONE, progress=False)
    replace, calls = Path.replace, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([fixtures / "data"], tmp_path / "killed", execution=ALONE, progress=False)
    monkeypatch.setattr(Path, "replace", replace)
    assert (tmp_path / "killed" / "train.bin").exists()
    assert not (tmp_path / "killed" / "meta.json").exists()
    prepare([fixtures / "data"], tmp_path / "killed", execution=ALONE, progress=False)
    whole, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")
    )
    assert whole == killed
