"""Model folders and runs as sources of weights: what is written is read again, what is damaged is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crystallm_jax.config import to_yaml
from crystallm_jax.convert.folder import CONFIG_FILE, WEIGHTS_FILE, read_folder, write_folder
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ConfigError, CrystallmError
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.load import crop_block_size, load_weights
from crystallm_jax.training.step import create_state

BIASED = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11, bias=True)


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
    write_folder(tmp_path / "model", BIASED, params, card="# A model\n")
    return tmp_path / "model"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2**-10)])
def test_a_model_folder_gives_back_what_was_written(
    dtype: str, tolerance: float, tmp_path: Path, params: Any
) -> None:
    path = tmp_path / "deep" / "model"
    write_folder(path, BIASED, params, card="# A model\n", dtype=dtype)
    read = read_folder(path)
    assert read.config == BIASED
    assert jax.tree.structure(read.params) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(read.params), jax.tree.leaves(params), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=1e-7 if tolerance else 0)
    assert {file.name for file in path.iterdir()} == {WEIGHTS_FILE, CONFIG_FILE, "MODEL_CARD.md"}
    assert {value.dtype for value in load_file(path / WEIGHTS_FILE).values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 9, b"cut"])
def test_damaged_weights_are_refused(content: bytes, folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-8] if content == b"cut" else content)
    _refused(lambda: load_weights(folder), str(weights), "damaged")


def test_weights_that_are_not_what_the_configuration_says_are_refused(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    tensors = load_file(weights)
    save_file(tensors | {"extra": np.zeros(2, np.float32)}, weights)
    _refused(lambda: read_folder(folder), str(weights), "extra")
    save_file({name: value for name, value in tensors.items() if name != "ln_f.scale"}, weights)
    _refused(lambda: read_folder(folder), str(weights), "ln_f.scale", "missing")
    save_file(tensors, weights)
    (folder / CONFIG_FILE).write_text(to_yaml(dataclasses.replace(BIASED, block_size=7)))
    _refused(lambda: read_folder(folder), "wpe.embedding", "(6, 8)", "(7, 8)")
    (folder / CONFIG_FILE).write_text("n_layer: two\n")
    with pytest.raises(ConfigError, match="n_layer"):
        read_folder(folder)
    (folder / CONFIG_FILE).unlink()
    _refused(lambda: read_folder(folder), str(folder / CONFIG_FILE), "no such")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    _refused(lambda: read_folder(folder), WEIGHTS_FILE, "no such file")


def test_weights_are_loaded_from_a_model_folder_and_from_a_run(
    folder: Path, tmp_path: Path, params: Any
) -> None:
    assert load_weights(folder).config == BIASED

    run = tmp_path / "run"
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dtype")
    config = TrainConfig(**{name: getattr(BIASED, name) for name in names}, batch_size=1)
    description = {"vocab_size": BIASED.vocab_size}
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        state = create_state(config, jax.device_put(params))
        checkpoints.save(state, step=3, data_state={}, description=description, val_loss=None)
    (run / CONFIG_FILE).write_text(to_yaml(config))
    read = load_weights(run)
    assert read.config == BIASED
    jax.tree.map(np.testing.assert_array_equal, read.params, params)


def test_where_no_model_is_nothing_is_loaded(tmp_path: Path) -> None:
    _refused(lambda: load_weights(tmp_path), str(tmp_path), "no model there")
    _refused(lambda: load_weights(tmp_path / "none"), "no model there")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / CONFIG_FILE).write_text(to_yaml(TrainConfig()))
    _refused(lambda: load_weights(tmp_path), "no complete checkpoint")


def test_a_shorter_context_keeps_the_logits_and_a_longer_one_is_refused(params: Any) -> None:
    cropped = crop_block_size(Weights(BIASED, params), 4, place="here")
    assert cropped.config == dataclasses.replace(BIASED, block_size=4)
    tokens = jnp.array([[1, 2, 3, 4]])
    whole = GPT(BIASED).apply({"params": params}, tokens)
    np.testing.assert_array_equal(GPT(cropped.config).apply({"params": cropped.params}, tokens), whole)
    _refused(lambda: crop_block_size(Weights(BIASED, params), 7, place="here"), "here", "block_size=7")
