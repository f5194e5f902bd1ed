"""Checkpoints: which are kept, and what happens to a run whose files are damaged or cannot be written."""

import errno
import gc
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import CoroutineType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.errors import ModelError
from crystallm_jax.train_run.checksums import CHECKSUMS_FILE, find_damage
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.step import TrainState

DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit": lambda path: _turn_a_bit(path, path.stat().st_size // 2),
}


def _turn_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def _state(value: int) -> TrainState:
    params = {"x": jnp.arange(2000.0) * value, "y": jnp.ones((3, 3)) * value}
    return TrainState(step=jnp.int32(value), params=params, opt_state=(), skipped=jnp.int32(0))


def _save(checkpoints: Checkpoints, step: int, loss: float | None = None) -> None:
    checkpoints.save(
        _state(step), step=step, data_state={"at": step}, description={"step": step}, val_loss=loss
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("checkpoints") / "written"
    with Checkpoints(folder, keep=3) as checkpoints:
        _save(checkpoints, 5)
        _save(checkpoints, 6)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def _restored(folder: Path, keep: int | None = None) -> int:
    """The step that is restored, once all of it is seen to be what was saved."""
    with Checkpoints(folder, keep) as checkpoints:
        restored = checkpoints.restore(_state(0))
    jax.tree.map(np.testing.assert_array_equal, restored.state, _state(restored.step))
    assert restored.data_state == {"at": restored.step}
    assert restored.description == {"step": restored.step, "val_loss": None}
    return restored.step


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            _save(checkpoints, step, losses[step])
    # Another process knows the best by what is on disk.
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (3, 4):
            _save(checkpoints, step, losses[step])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
        assert checkpoints.describe(2) == {"step": 2, "val_loss": 1.0}
        assert checkpoints.describe()["step"] == 4
        with pytest.raises(ModelError, match="no complete checkpoint of step 1"):
            checkpoints.describe(1)
        with pytest.raises(ModelError, match="of step 3"):
            checkpoints.restore(_state(0), 3)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": jnp.ones(3), "y": jnp.ones((3, 3))}, r"params/x has shape \(2000,\), where \(3,\)"),
        ({"x": jnp.ones(2000), "y": jnp.ones((3, 3)), "z": jnp.ones(1)}, "params/z is missing"),
        ({"x": jnp.ones(2000)}, "it holds params/y, which this configuration has not"),
    ],
    ids=["shape", "missing", "extra"],
)
def test_other_arrays_are_refused_and_no_other_checkpoint_is_tried(
    params: dict[str, jax.Array], message: str, folder: Path
) -> None:
    other = TrainState(step=jnp.int32(0), params=params, opt_state=(), skipped=jnp.int32(0))
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(ModelError, match=f"6: cannot be restored: {message}"),
    ):
        checkpoints.restore(other)


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_file_is_damaged_the_checkpoint_before_is_taken(
    damage: str, written: Path, tmp_path: Path
) -> None:
    for number, file in enumerate(_files(written / "6")):
        folder = shutil.copytree(written, tmp_path / str(number))
        DAMAGE[damage](folder / file.relative_to(written))
        in_use = file.name not in {"_CHECKPOINT_METADATA", "commit_success.txt"} or file.parent.name != "6"
        without = file.name == CHECKSUMS_FILE and damage == "removed"
        assert _restored(folder) == (5 if in_use and not without else 6), file


@pytest.mark.parametrize("damage", ["removed", "empty", "cut"])
def test_arrays_and_their_index_are_missed_without_checksums_too(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What orbax was still reading of the damaged one fails in threads and says so when it is collected. Pytest would
    # keep it alive and tell of it in another test.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    (folder / "6" / CHECKSUMS_FILE).unlink()
    assert _restored(folder) == 6
    file = max(_files(folder / "6" / "state"), key=lambda path: path.stat().st_size)
    DAMAGE[damage](file)
    with caplog.at_level(logging.WARNING, logger="crystallm_jax"):
        assert _restored(folder) == 5
    assert "cannot be restored" in caplog.text
    for _ in range(100):
        gc.collect()
        # By its type: other libraries keep objects that warn when they are asked for their class.
        if not any(issubclass(type(found), CoroutineType) for found in gc.get_objects()):
            break
        time.sleep(0.05)


def test_a_fallback_is_one_line_and_the_damaged_one_is_set_aside_by_who_writes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = max(_files(folder / "6" / "state"), key=lambda path: path.stat().st_size)
    _turn_a_bit(arrays, 1000)
    before = _files(folder)
    with caplog.at_level(logging.WARNING, logger="crystallm_jax"), Checkpoints(folder) as checkpoints:
        assert checkpoints.describe()["step"] == 5
        assert checkpoints.restore(_state(0)).step == 5
        with pytest.raises(ModelError, match=r"6: damaged: state/.* has changed since it was written"):
            checkpoints.restore(_state(0), 6)
    assert len(caplog.messages) == 1
    for part in (str(folder), "step 6: state/", "has changed since it was written", "step 5 is taken"):
        assert part in caplog.messages[0]
    assert _files(folder) == before
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.restore(_state(0)).step == 5
        assert checkpoints.latest_step() == 5
        _save(checkpoints, 6)
    assert find_damage(folder / "6.damaged") is not None
    assert _restored(folder, keep=3) == 6


def test_nothing_intact_is_one_line(folder: Path) -> None:
    for step in ("5", "6"):
        (folder / step / "state" / "manifest.ocdbt").unlink()
    with Checkpoints(folder, keep=3) as checkpoints, pytest.raises(ModelError) as caught:
        checkpoints.restore(_state(0))
    assert str(caught.value) == (
        f"{folder / '6'}: damaged: state/manifest.ocdbt is missing; no other is intact either: begin anew in another"
        " out_dir"
    )
    assert {path.name for path in folder.iterdir()} == {"5", "6"}


def test_half_written_ones_are_passed_over_and_removed_by_who_writes(folder: Path) -> None:
    half = folder / "7.orbax-checkpoint-tmp"
    shutil.copytree(folder / "6", half)
    assert _restored(folder) == 6
    assert half.is_dir()
    with Checkpoints(folder, keep=3) as checkpoints:
        _save(checkpoints, 7)
    assert not half.exists()
    assert _restored(folder) == 7


def test_a_write_that_fails_behind_the_training_is_noticed_without_another_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        time.sleep(0.1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("crystallm_jax.training.checkpoint.write_checksums", full)

    def train(checkpoints: Checkpoints) -> None:
        _save(checkpoints, 7)
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)

    with pytest.raises(ModelError) as caught, Checkpoints(folder, keep=3) as checkpoints:
        train(checkpoints)
    assert "could not be written ([Errno 28] No space left on device)" in str(caught.value)
    assert "the checkpoint of step 6 is intact" in str(caught.value)
    assert _restored(folder) == 6
