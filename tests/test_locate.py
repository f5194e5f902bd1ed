"""Models by name: fetched and converted once; and published archives as files."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from crystallm_jax.errors import CrystallmError
from crystallm_jax.models import locate
from crystallm_jax.models.card import CARD_FILE
from crystallm_jax.models.kinds import read_model
from crystallm_jax.models.parameters import flattened

NAME = "crystallm_v1_small"
PUBLISHED = Path(__file__).parent / "fixtures" / "models" / "published.pt"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRYSTALLM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"{NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(PUBLISHED, f"{NAME}/ckpt.pt")
    return path


def test_a_published_model_is_fetched_and_converted_once(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        return archive

    monkeypatch.setattr(locate, "fetch", fetch)
    first, second = read_model(NAME), read_model(NAME)
    assert fetched == [NAME]
    expected = flattened(read_model(PUBLISHED).params)
    for weights in (first, second, read_model(archive)):
        for name, value in flattened(weights.params).items():
            np.testing.assert_array_equal(value, expected[name])
    folder = locate.locate(NAME)
    assert "license: cc-by-4.0" in (folder / CARD_FILE).read_text()
    assert {path.name for path in folder.parent.iterdir()} == {NAME}


def test_a_place_of_the_same_name_is_meant_before_the_published_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate.is_name(NAME)
    (tmp_path / NAME).mkdir()
    assert not locate.is_name(NAME)
    with pytest.raises(CrystallmError, match="no model there"):
        read_model(NAME)


def test_an_archive_without_a_checkpoint_is_one_line(archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as file:
        file.add(PUBLISHED, f"{NAME}/readme.txt")
    with pytest.raises(CrystallmError, match=r"holds none, where one ckpt\.pt was expected") as caught:
        read_model(archive)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_and_names_that_no_file_can_have_are_one_line(
    archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CRYSTALLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CrystallmError, match="set CRYSTALLM_CACHE to a folder that can be used"):
        read_model(archive)
    with pytest.raises(CrystallmError, match="File name too long"):
        read_model("x" * 300)
