"""Decoding's own forward pass: what it reads as columns, from a text's beginning or going on, is what `GPT` reads."""

import dataclasses
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.model.columns import attend_columns
from crystallm_jax.model.inference import Weights, prepare_weights, read_columns
from crystallm_jax.sampling.reader import Read, read_texts

PLAIN = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=371)
BIASED = dataclasses.replace(PLAIN, bias=True)
ROUNDED = dataclasses.replace(BIASED, dtype="bfloat16")
TOLERANCE = 1e-5
# Texts of one reading, with three columns of filling before the end.
LENGTHS = (20, 1, 33, 7)
COLUMNS = sum(LENGTHS) + 3


def _random_params(config: ModelConfig) -> Any:
    """Parameters that make every part count: nothing is zero, one or small."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        mean, std = {"scale": (1.0, 0.3), "bias": (0.0, 0.1), "embedding": (0.0, 0.12)}.get(name, (0.0, 0.2))
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return np.random.default_rng(2).integers(0, PLAIN.vocab_size, (4, PLAIN.block_size)).astype(np.int32)


@pytest.fixture(scope="module")
def biased() -> Any:
    return _random_params(BIASED)


@pytest.fixture(scope="module")
def weights(biased: Any) -> Weights:
    return prepare_weights(BIASED, biased)


@pytest.fixture(scope="module")
def full(biased: Any, texts: np.ndarray) -> np.ndarray:
    """Logits [4, T, V] of the texts."""
    return _whole(BIASED, biased, texts)


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return GPT(config).apply({"params": params}, tokens)


def _whole(config: ModelConfig, params: Any, texts: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(config, params, texts))


@partial(jax.jit, static_argnums=0)
def _side_by_side(
    config: ModelConfig, weights: Weights, tokens: jax.Array, positions: jax.Array, text: jax.Array
) -> jax.Array:
    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_columns(q, k, v, text=text)

    return read_columns(config, weights, tokens, positions, attend=attend)


def _columns(config: ModelConfig, params: Any, texts: np.ndarray) -> list[np.ndarray]:
    """Logits [T, V] of the beginnings of the texts, read side by side."""
    tokens, positions = np.full(COLUMNS, 5, np.int32), np.zeros(COLUMNS, np.int32)
    text = np.full(COLUMNS, len(LENGTHS), np.int32)
    first, places = 0, []
    for number, length in enumerate(LENGTHS):
        here = slice(first, first + length)
        tokens[here], positions[here], text[here] = texts[number, :length], np.arange(length), number
        places.append(here)
        first += length
    found = _side_by_side(config, prepare_weights(config, params), tokens, positions, text)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()
    return [np.asarray(found[here]) for here in places]


def test_columns_have_the_logits_of_the_model_without_biases(texts: np.ndarray) -> None:
    params = _random_params(PLAIN)
    whole = _whole(PLAIN, params, texts)
    for number, logits in enumerate(_columns(PLAIN, params, texts)):
        np.testing.assert_allclose(logits, whole[number, : len(logits)], rtol=0, atol=TOLERANCE)


def test_columns_have_the_logits_of_the_model_with_biases(
    biased: Any, full: np.ndarray, texts: np.ndarray
) -> None:
    for number, logits in enumerate(_columns(BIASED, biased, texts)):
        np.testing.assert_allclose(logits, full[number, : len(logits)], rtol=0, atol=TOLERANCE)


def test_columns_of_bfloat16_differ_by_its_rounding(biased: Any, full: np.ndarray, texts: np.ndarray) -> None:
    prepared = prepare_weights(ROUNDED, biased)
    assert prepared.wte.dtype == prepared.layers[0].mlp_in.kernel.dtype == jnp.bfloat16
    spread = full.std()
    for number, logits in enumerate(_columns(ROUNDED, biased, texts)):
        error = np.abs(logits - full[number, : len(logits)])
        assert 0 < error.max() < 0.1 * spread
        assert error.mean() < 0.02 * spread


def test_what_a_step_reads_is_counted(weights: Weights) -> None:
    D, V, L = BIASED.n_embd, BIASED.vocab_size, BIASED.n_layer
    assert weights.nbytes == 4 * (V * D + L * (12 * D * D + 13 * D))


def _read(weights: Weights, texts: list[np.ndarray]) -> list[Read]:
    return list(chain.from_iterable(read_texts(BIASED, weights, texts, page=16, dtype="float32")))


def test_texts_that_are_read_have_pages_and_the_log_probabilities_of_their_tokens(
    weights: Weights, full: np.ndarray, texts: np.ndarray
) -> None:
    reads = _read(weights, [texts[i, :n] for i, n in enumerate(LENGTHS)])
    # All in one reading; each with as many positions as tokens but the last.
    assert len({id(read.reading) for read in reads}) == 1
    assert [sum(read.fills) for read in reads] == [n - 1 for n in LENGTHS]
    assert reads[0].fills == [16, 3]
    log_probs = np.asarray(jax.nn.log_softmax(full))
    for i, (read, n) in enumerate(zip(reads, LENGTHS, strict=True)):
        expected = log_probs[i, np.arange(n - 1), texts[i, 1:n]]
        np.testing.assert_allclose(read.reading.log_probs[read.number, 1:n], expected, rtol=0, atol=1e-4)


def test_many_texts_are_read_in_several_readings_in_their_order(
    weights: Weights, full: np.ndarray, texts: np.ndarray
) -> None:
    lengths = [60, 64, 1, 60, 3, 64, 20]
    reads = _read(weights, [texts[i % 4, :n] for i, n in enumerate(lengths)])
    groups = [id(read.reading) for read in reads]
    assert len(set(groups)) == 2
    assert groups == sorted(groups, key=groups.index)
    log_probs = np.asarray(jax.nn.log_softmax(full))
    for i, (read, n) in enumerate(zip(reads, lengths, strict=True)):
        expected = log_probs[i % 4, np.arange(n - 1), texts[i % 4, 1:n]]
        np.testing.assert_allclose(read.reading.log_probs[read.number, 1:n], expected, rtol=0, atol=1e-4)
