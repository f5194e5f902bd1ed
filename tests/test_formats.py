"""Every format that this package ever wrote loads, and gives the numbers that it gave then.

The fixtures hold two tiny models: `run_2` is a run that went on from the other, which lies in all other formats; its
first logits were computed by the version that trained it. `tools/make_format_fixtures.py` adds those of a new format;
none is ever removed.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import crystallm_jax as cl
from crystallm_jax.models import huggingface, npz
from crystallm_jax.models.card import FOLDER_FORMAT, read_card
from crystallm_jax.models.model_folder import read_folder_training
from crystallm_jax.models.published import read_published_training
from crystallm_jax.models.runs import read_run_training

MODELS = Path(__file__).parent / "fixtures" / "models"
FORMATS = ("folder_1", "folder_2", "hub_1", "numpy_1.npz", "published.pt", "run_1", "run_2")
# A run of this version's and one of before `c_attn` was three kernels and `skipped` was counted.
RUNS = ("run_1", "run_2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in RUNS:
        with tarfile.open(MODELS / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


def test_there_is_a_fixture_of_every_format_of_today() -> None:
    wanted = {f"folder_{FOLDER_FORMAT}", f"hub_{huggingface.FORMAT}", f"numpy_{npz.FORMAT}.npz"}
    assert wanted <= set(FORMATS)
    found = {path.name.removesuffix(".tar.xz") for path in MODELS.iterdir()} - {"expected.npz"}
    assert found == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_of_this_format_gives_the_logits_that_it_gave(name: str, runs: Path) -> None:
    model = cl.load_model((runs if name in RUNS else MODELS) / name)
    with np.load(MODELS / "expected.npz") as expected:
        logits = np.asarray(model.logits(expected["tokens"]))[:, expected["positions"]]
        np.testing.assert_allclose(
            logits, expected["run_2" if name == "run_2" else "logits"], rtol=0, atol=1e-6
        )


def test_moments_of_every_format_are_those_of_the_run(runs: Path) -> None:
    first = read_run_training(runs / "run_1").training
    assert (first.step, first.moments.updates) == (3, 3)
    for read in (read_folder_training(MODELS / "folder_2"), read_published_training(MODELS / "published.pt")):
        assert (read.training.step, read.training.moments.updates) == (3, 3)
        np.testing.assert_array_equal(
            read.training.moments.second["h_1"]["attn"]["c_attn"]["kernel"],
            first.moments.second["h_1"]["attn"]["c_attn"]["kernel"],
        )
    # It went on from the first's third step.
    assert read_run_training(runs / "run_2").training.moments.updates == 4


def test_the_card_of_a_folder_of_today_says_what_it_said() -> None:
    card = read_card(MODELS / f"folder_{FOLDER_FORMAT}")
    assert (card.license, card.metrics, card.format) == ("cc0-1.0", {"val_loss": 5.0}, FOLDER_FORMAT)
    assert read_card(MODELS / "folder_1").format == 1
