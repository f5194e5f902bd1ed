"""Model folders and runs as sources of weights: what is written is read again, what is damaged is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crystallm_jax.config import to_yaml
from crystallm_jax.errors import CrystallmError, ModelError
from crystallm_jax.files import new_folder
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.model.stacking import stacked
from crystallm_jax.models.card import CARD_FILE, ModelCard, damage_of, read_card
from crystallm_jax.models.crop import crop_block_size
from crystallm_jax.models.kinds import read_model
from crystallm_jax.models.model import Model, Moments, Training
from crystallm_jax.models.model_folder import (
    CONFIG_FILE,
    MOMENTS_FILE,
    TRAINING_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    read_folder,
    read_folder_training,
    write_folder,
)
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.step import create_state

BIASED = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11, bias=True)
SPEAKING = dataclasses.replace(BIASED, vocab_size=371, n_layer=1)


def _refused(read: Callable[[], Any], *parts: str) -> str:
    with pytest.raises(CrystallmError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.device_get(jax.jit(init_params, static_argnums=0)(BIASED, jax.random.key(0)))


@pytest.fixture
def folder(tmp_path: Path, params: Any) -> Path:
    write_folder(tmp_path / "model", Model(BIASED, params))
    return tmp_path / "model"


@pytest.fixture
def old_folder(folder: Path) -> Path:
    """As format 1 had it: no hashes."""
    (folder / CARD_FILE).write_text("# A model\n")
    return folder


def _equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_a_model_folder_gives_back_what_was_written(
    dtype: Any, tolerance: float, tmp_path: Path, params: Any
) -> None:
    path = tmp_path / "deep" / "model"
    write_folder(path, Model(BIASED, params), dtype=dtype)
    read = read_folder(path)
    assert read.config == BIASED
    assert jax.tree.structure(read.params) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(read.params), jax.tree.leaves(params), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=1e-7 if tolerance else 0)
    assert {file.name for file in path.iterdir()} == {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}
    assert {value.dtype.name for value in load_file(path / WEIGHTS_FILE).values()} == {dtype}


def test_bfloat16_is_read_where_no_jax_is_loaded(tmp_path: Path, params: Any) -> None:
    write_folder(tmp_path / "model", Model(BIASED, params), dtype="bfloat16")
    code = (
        "import sys; from crystallm_jax.models.model_folder import read_folder;"
        f" read_folder({str(tmp_path / 'model')!r}); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    killed = tmp_path / ".model.1.partial"
    killed.mkdir()
    path = tmp_path / "model"

    def write_while_another_ends() -> None:
        with new_folder(path):
            path.mkdir()
            (path / "file").write_text("of the other")

    with pytest.raises(OSError, match="not empty"):
        write_while_another_ends()
    assert (path / "file").read_text() == "of the other"
    assert set(tmp_path.iterdir()) == {killed, path}


def test_orbax_parameters_are_the_same_model(tmp_path: Path, params: Any) -> None:
    path = tmp_path / "model"
    write_folder(path, Model(BIASED, params), storage="orbax")
    assert not (path / WEIGHTS_FILE).exists()
    _equal(read_model(path).params, params)
    part = max((path / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    part.write_bytes(b"\0" * part.stat().st_size)
    _refused(lambda: read_model(path), str(path), "damaged")


def test_moments_travel_with_a_folder_and_are_read_when_asked_for(tmp_path: Path, params: Any) -> None:
    first, second = (jax.tree.map(lambda leaf, k=k: leaf + k, params) for k in (1, 2))
    training = Training(7, 0.5, {"beta1": 0.9}, Moments(6, first, second))
    write_folder(tmp_path / "model", Model(BIASED, params, training))
    light = read_folder(tmp_path / "model").training
    assert light == Training(7, 0.5, {"beta1": 0.9})
    read = read_folder_training(tmp_path / "model").training
    assert (read.step, read.moments.updates) == (7, 6)
    _equal((read.moments.first, read.moments.second), (first, second))
    moments = tmp_path / "model" / MOMENTS_FILE
    moments.write_bytes(moments.read_bytes()[:-4] + b"oops")
    _refused(lambda: read_folder_training(tmp_path / "model"), MOMENTS_FILE, "damaged")
    (tmp_path / "model" / TRAINING_FILE).write_text("{")
    _refused(lambda: read_folder(tmp_path / "model"), TRAINING_FILE)


def test_a_card_says_what_is_known_and_its_hashes_hold(tmp_path: Path) -> None:
    weights = Model(SPEAKING, jax.device_get(init_params(SPEAKING, jax.random.key(1))))
    card = ModelCard("cc-by-4.0", "Crystals: of --- many kinds", "crystallm train", {"val_loss": 0.25})
    written = write_folder(tmp_path / "model", weights, card=card)
    read = read_card(tmp_path / "model")
    assert read == dataclasses.replace(written, text=read.text)
    assert (read.license, read.data, read.metrics) == (card.license, card.data, card.metrics)
    assert set(read.files) == {WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE}
    assert [damage_of(tmp_path / "model", read, name) for name in read.files] == [None] * 3
    tokens = json.loads((tmp_path / "model" / VOCABULARY_FILE).read_text())
    (tmp_path / "model" / VOCABULARY_FILE).write_text(json.dumps([tokens[1], tokens[0], *tokens[2:]]))
    assert damage_of(tmp_path / "model", read, VOCABULARY_FILE)
    _refused(lambda: read_folder(tmp_path / "model"), VOCABULARY_FILE, "token 0")


@pytest.mark.parametrize(
    "head",
    [
        "a: [",
        "files: 3",
        "files: {x: 1}",
        "files: {../x: {bytes: 1, sha256: a}}",
        "metrics: {a: b}",
        "a: &x [1]\nb: *x",
    ],
)
def test_a_damaged_card_is_refused(head: str, folder: Path) -> None:
    (folder / CARD_FILE).write_text(f"---\n{head}\n---\nText\n")
    _refused(lambda: read_model(folder), CARD_FILE, "damaged")
    (folder / CARD_FILE).write_text("---\nformat: 3\n---\n")
    _refused(lambda: read_model(folder), "format 3", "newer")


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 9, b"cut", b"bit"])
def test_damaged_weights_are_refused(content: bytes, folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(
        {b"cut": whole[:-8], b"bit": whole[:-1] + bytes([whole[-1] ^ 1])}.get(content, content)
    )
    _refused(lambda: read_model(folder), str(folder), WEIGHTS_FILE, "damaged")
    (folder / CARD_FILE).unlink()
    if content != b"bit":
        _refused(lambda: read_model(folder), str(weights), "damaged")


def test_weights_that_are_not_what_the_configuration_says_are_refused(old_folder: Path) -> None:
    weights = old_folder / WEIGHTS_FILE
    tensors = load_file(weights)
    save_file(tensors | {"extra": np.zeros(2, np.float32)}, weights)
    _refused(lambda: read_folder(old_folder), str(weights), "extra")
    save_file({name: value for name, value in tensors.items() if name != "ln_f.scale"}, weights)
    _refused(lambda: read_folder(old_folder), str(weights), "ln_f.scale", "missing")
    save_file(tensors | {"ln_f.scale": np.full(8, np.nan, np.float32)}, weights)
    _refused(lambda: read_folder(old_folder), str(weights), "ln_f.scale", "not finite")
    save_file(tensors, weights)
    (old_folder / CONFIG_FILE).write_text(to_yaml(dataclasses.replace(BIASED, block_size=7)))
    _refused(lambda: read_folder(old_folder), "wpe.embedding", "(6, 8)", "(7, 8)")
    (old_folder / CONFIG_FILE).write_text("n_layer: two\n")
    _refused(lambda: read_folder(old_folder), CONFIG_FILE, "n_layer")
    (old_folder / CONFIG_FILE).unlink()
    _refused(lambda: read_folder(old_folder), str(old_folder / CONFIG_FILE), "no such")


def test_a_folder_that_is_there_is_not_written_over(folder: Path, params: Any) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ModelError, match="is there already"):
        write_folder(folder, Model(BIASED, params))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_weights_are_loaded_from_a_run(layers: Any, tmp_path: Path, params: Any) -> None:
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dtype")
    config = TrainConfig(**{name: getattr(BIASED, name) for name in names}, batch_size=1, layers=layers)
    trained = stacked(params, BIASED.n_layer) if layers == "scanned" else params
    state = create_state(config, jax.device_put(trained))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        described = {"vocab_size": BIASED.vocab_size}
        checkpoints.save(state, step=3, data_state={}, description=described, val_loss=None)
    (tmp_path / CONFIG_FILE).write_text(to_yaml(config))
    for path in (tmp_path, tmp_path / "checkpoints" / "3"):
        read = read_model(path)
        assert read.config == BIASED
        _equal(read.params, params)


def test_where_no_model_is_nothing_is_loaded(tmp_path: Path) -> None:
    _refused(lambda: read_model(tmp_path), str(tmp_path), "no model there")
    _refused(lambda: read_model(tmp_path / "none"), "no model there")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / CONFIG_FILE).write_text(to_yaml(TrainConfig()))
    _refused(lambda: read_model(tmp_path), "no complete checkpoint")


def test_a_shorter_context_keeps_the_logits_and_a_longer_one_is_refused(params: Any) -> None:
    cropped = crop_block_size(Model(BIASED, params), 4, place="here")
    assert cropped.config == dataclasses.replace(BIASED, block_size=4)
    tokens = jnp.array([[1, 2, 3, 4]])
    whole = GPT(BIASED).apply({"params": params}, tokens)
    np.testing.assert_array_equal(GPT(cropped.config).apply({"params": cropped.params}, tokens), whole)
    _refused(lambda: crop_block_size(Model(BIASED, params), 7, place="here"), "here", "block_size=7")


@pytest.mark.parametrize("name", ["vocab.json", CARD_FILE])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)  # this vocabulary is not the package's
    os.mkfifo(folder / name)
    _refused(lambda: read_model(folder), name, "no plain file")


def test_checkpoints_that_cannot_be_listed_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager", refuse)
    _refused(lambda: Checkpoints(tmp_path / "checkpoints"), str(tmp_path / "checkpoints"), "cannot be used")
