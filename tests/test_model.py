"""The transformer: its numbers, its dropout, its beginning."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.errors import ConfigError
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.model.attention import causal_attention, check_platform, choose_backend
from crystallm_jax.model.linear import linear, lookup
from crystallm_jax.model.splash import splash_causal_attention
from crystallm_jax.model.stacking import stacked, unstacked
from crystallm_jax.models import read_published

PLAIN = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=371)
BIASED = dataclasses.replace(PLAIN, bias=True)
LOGIT_TOLERANCE = 1e-5


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return GPT(config).apply({"params": params}, tokens)


def _random_params(config: ModelConfig, seed: int) -> Any:
    """Parameters that make every part count: nothing is zero, one or small."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        mean, std = {"scale": (1.0, 0.3), "bias": (0.0, 0.1), "embedding": (0.0, 0.12)}.get(name, (0.0, 0.2))
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def models() -> dict[ModelConfig, Any]:
    return {config: _random_params(config, seed) for seed, config in enumerate((PLAIN, BIASED))}


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, PLAIN.vocab_size, (4, PLAIN.block_size))


def _reference_logits(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """The published forward pass, written out in plain NumPy and double precision."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    B, T = tokens.shape
    H, d = config.n_head, config.n_embd // config.n_head

    def norm(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights["scale"] + weights.get("bias", 0.0)

    def dense(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        # Queries, keys and values side by side, as published.
        kernel = weights["kernel"].reshape(x.shape[-1], -1)
        return x @ kernel + np.ravel(weights.get("bias", 0.0))

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][:T]
    for layer in range(config.n_layer):
        block = params[f"h_{layer}"]
        q, k, v = np.split(dense(norm(x, block["ln_1"]), block["attn"]["c_attn"]), 3, axis=-1)
        mixed = np.zeros_like(q)
        for row in range(B):
            for head in range(H):
                part = slice(head * d, (head + 1) * d)
                scores = q[row, :, part] @ k[row, :, part].T / math.sqrt(d)
                scores[np.triu_indices(T, 1)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                mixed[row, :, part] = weights / weights.sum(-1, keepdims=True) @ v[row, :, part]
        x = x + dense(mixed, block["attn"]["c_proj"])
        x = x + dense(gelu(dense(norm(x, block["ln_2"]), block["mlp"]["c_fc"])), block["mlp"]["c_proj"])
    return norm(x, params["ln_f"]) @ params["wte"]["embedding"].T


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_logits_are_those_of_a_plain_forward_pass(
    config: ModelConfig, models: dict[ModelConfig, Any], tokens: np.ndarray
) -> None:
    logits = _logits(config, models[config], tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(
        logits, _reference_logits(config, models[config], tokens), rtol=0, atol=LOGIT_TOLERANCE
    )


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_logits_are_the_published_ones(name: str, golden: Path) -> None:
    checkpoint = read_published(golden / "model" / name / "ckpt.pt")
    recorded = np.load(golden / "model" / name / "logits.npz")
    # Dropout of 0.1 is saved with b: it must play no part unless asked for.
    config = checkpoint.config
    logits = np.asarray(_logits(config, checkpoint.params, recorded["input_ids"]))
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(
        _reference_logits(config, checkpoint.params, recorded["input_ids"]),
        recorded["logits"],
        rtol=0,
        atol=LOGIT_TOLERANCE,
    )


def test_a_token_reaches_its_own_logits_and_later_ones_alone(
    models: dict[ModelConfig, Any], tokens: np.ndarray
) -> None:
    T = 24
    params = models[PLAIN]

    def summed(positions: jax.Array) -> jax.Array:
        changed = {**params, "wpe": {"embedding": positions}}
        logits = GPT(PLAIN).apply({"params": changed}, tokens[:1, :T])
        return jnp.sum(jnp.sin(logits[0]), axis=-1)

    # [output position, input position]: how far a position's embedding moves each logit.
    jacobian = jax.jit(jax.jacrev(summed))(params["wpe"]["embedding"])
    influence = np.abs(jacobian).max(axis=-1)
    assert np.all(influence[:, T:] == 0)
    seen = np.tril(np.ones((T, T), bool))
    assert np.all(influence[:, :T][~seen] == 0)
    assert np.all(influence[:, :T][seen] > 0)


@pytest.mark.parametrize("T", [7, 128, 200, 257])
def test_blocked_attention_equals_the_plain_one_with_its_gradients(T: int) -> None:
    rng = np.random.default_rng(T)
    q, k, v, weight = (rng.normal(size=(2, 2, T, 8)).astype(np.float32) for _ in range(4))

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(backend: str, *inputs: jax.Array) -> tuple[jax.Array, Any]:
        output, pull = jax.vjp(lambda *x: causal_attention(*x, backend=backend), *inputs)
        return output, pull(weight)

    blocked, plain = (value_and_gradients(backend, q, k, v) for backend in ("blocked", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=5e-6), blocked, plain)
    scores = np.where(np.tri(T, dtype=bool), np.einsum("BHTd,BHSd->BHTS", q, k) / math.sqrt(8), -np.inf)
    by_hand = np.einsum("BHTS,BHSd->BHTd", np.asarray(jax.nn.softmax(scores, axis=-1)), v)
    np.testing.assert_allclose(blocked[0], by_hand, rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", ["xla", "blocked", "cudnn"])
def test_attention_stays_within_segments(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cudnn":
        # The kernel is not here: what it is asked for is done by XLA.
        by_xla = partial(jax.nn.dot_product_attention, implementation="xla")
        monkeypatch.setattr(
            jax.nn,
            "dot_product_attention",
            lambda *x, implementation, mask, is_causal: by_xla(*x, mask=mask, is_causal=is_causal),
        )
    T = 200
    rng = np.random.default_rng(1)
    q, k, v, weight = (rng.normal(size=(2, 2, T, 8)).astype(np.float32) for _ in range(4))
    # Records that end within a block, at its end and beyond it, padding, and a row of nothing but padding.
    segments = np.stack([np.repeat([1, 2, 3, 4, 0], [50, 78, 2, 40, 30]), np.zeros(T)]).astype(np.uint16)
    visible = np.tri(T, dtype=bool) & (segments[:, :, None] == segments[:, None, :])

    def by_hand(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("BHTd,BHSd->BHTS", q, k, precision="highest") / math.sqrt(8)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BHTS,BHSd->BHTd", weights, v, precision="highest")

    def value_and_gradients(attend: Callable[..., jax.Array]) -> tuple[jax.Array, Any]:
        output, pull = jax.vjp(attend, q, k, v)
        return output, pull(weight)

    found = value_and_gradients(partial(causal_attention, backend=backend, segment_ids_BT=segments))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=5e-6), found, value_and_gradients(by_hand))


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_records_in_a_row_have_the_logits_that_each_has_alone(
    backend: str, models: dict[ModelConfig, Any], tokens: np.ndarray
) -> None:
    config = dataclasses.replace(BIASED, attention=backend)
    lengths = (20, 1, 30)  # and 13 of padding
    segments = np.repeat([1, 2, 3, 0], [*lengths, 13])[None]
    positions = np.concatenate([np.arange(length) for length in (*lengths, 13)])[None]
    row = tokens[:1]

    @jax.jit
    def logits(row: jax.Array) -> jax.Array:
        given = {"positions": positions, "segment_ids": segments}
        return GPT(config).apply({"params": models[BIASED]}, row, **given)

    found, first = np.asarray(logits(row)), 0
    assert np.isfinite(found).all()
    for length in lengths:
        alone = _reference_logits(BIASED, models[BIASED], row[:, first : first + length])
        np.testing.assert_allclose(found[:, first : first + length], alone, rtol=0, atol=LOGIT_TOLERANCE)
        first += length
    # Whatever the first and the last hold, and the padding, the third's are the same to the bit.
    changed = row.copy()
    changed[:, :21], changed[:, 51:] = 7, 8
    np.testing.assert_array_equal(np.asarray(logits(changed))[:, 21:51], found[:, 21:51])


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_attention_dropout_drops_its_rate_of_the_probabilities_and_scales_the_others(backend: str) -> None:
    rate, B, T = 0.25, 2000, 2
    ones = jnp.ones((B, 1, T, 4))
    output = causal_attention(
        ones, ones, ones, backend=backend, dropout_rate=rate, dropout_key=jax.random.key(0)
    )
    # The first query sees one key with probability 1: it is dropped or scaled by 1 / (1 - rate).
    first = np.asarray(output[:, 0, 0, 0])
    np.testing.assert_allclose(np.unique(first.round(5)), [0, 1.33333], atol=1e-5)
    assert (first == 0).mean() == pytest.approx(rate, abs=0.03)
    # The second sees two with a half each.
    np.testing.assert_allclose(
        np.unique(np.asarray(output[:, 0, 1]).round(5)), [0, 0.66667, 1.33333], atol=1e-5
    )
    undisturbed = causal_attention(ones, ones, ones, backend=backend, dropout_rate=rate)
    np.testing.assert_allclose(undisturbed, ones, rtol=1e-6)


def _silence(params: Any, *branches: str) -> Any:
    """Branches of every block whose output is made zero, so that dropout on it cannot show."""

    def zero(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return np.zeros_like(leaf) if any(f"{branch}/c_proj" in name for branch in branches) else leaf

    return jax.tree_util.tree_map_with_path(zero, params)


def _without_embeddings(params: Any) -> Any:
    """Token 0 at any position has the embedding zero: dropout on embeddings cannot show."""
    table = params["wte"]["embedding"].copy()
    table[0] = 0
    positions = np.zeros_like(params["wpe"]["embedding"])
    return {**params, "wte": {"embedding": table}, "wpe": {"embedding": positions}}


@pytest.mark.parametrize(
    ("rates", "prepare"),
    [
        ((0.5, 0.0), lambda params: _silence(params, "attn", "mlp")),
        ((0.5, 0.0), lambda params: _silence(_without_embeddings(params), "mlp")),
        ((0.5, 0.0), lambda params: _silence(_without_embeddings(params), "attn")),
        ((0.0, 0.5), lambda params: _silence(_without_embeddings(params), "mlp")),
    ],
    ids=["embeddings", "attention branch", "mlp branch", "attention probabilities"],
)
def test_dropout_is_active_at_each_published_place(
    rates: tuple[float, float], prepare: Callable[[Any], Any], models: dict[ModelConfig, Any]
) -> None:
    config = dataclasses.replace(
        BIASED, n_layer=1, block_size=4, vocab_size=11, dropout=rates[0], attention_dropout=rates[1]
    )
    params = prepare(_random_params(config, 5))
    tokens = np.zeros((1, 4), int)

    def logits(key: int) -> np.ndarray:
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(GPT(config).apply({"params": params}, tokens, deterministic=False, rngs=rngs))

    still = np.asarray(GPT(config).apply({"params": params}, tokens))
    assert np.abs(logits(0) - still).max() > 0.01
    assert np.abs(logits(0) - logits(1)).max() > 0.01
    np.testing.assert_array_equal(logits(0), logits(0))
    np.testing.assert_allclose(still, _reference_logits(config, params, tokens), rtol=0, atol=LOGIT_TOLERANCE)


def test_dropout_is_off_unless_asked_for(models: dict[ModelConfig, Any], tokens: np.ndarray) -> None:
    config = dataclasses.replace(PLAIN, dropout=0.5)
    rows = tokens[:1, :8]
    quiet = _logits(config, models[PLAIN], rows)
    np.testing.assert_allclose(
        quiet, _reference_logits(PLAIN, models[PLAIN], rows), rtol=0, atol=LOGIT_TOLERANCE
    )


def test_bfloat16_stays_near_float32_and_gives_float32_logits(
    models: dict[ModelConfig, Any], tokens: np.ndarray
) -> None:
    config = dataclasses.replace(BIASED, dtype="bfloat16")
    logits = _logits(config, models[BIASED], tokens)
    exact = _reference_logits(BIASED, models[BIASED], tokens)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - exact)
    assert 0 < error.max() < 0.1 * exact.std()
    assert error.mean() < 0.02 * exact.std()


@pytest.mark.parametrize("shape", [(3, 700, 16), (5, 16), (16,)])
def test_the_gradients_of_linear_are_those_of_a_product(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(16, 24)).astype(np.float32)
    weight = rng.normal(size=(*shape[:-1], 24)).astype(np.float32)
    y, pull = jax.vjp(linear, x, kernel)
    dx, dkernel = pull(weight)
    flat, flat_weight = x.reshape(-1, 16).astype(np.float64), weight.reshape(-1, 24)
    np.testing.assert_allclose(y, x @ kernel, rtol=0, atol=1e-5)
    np.testing.assert_allclose(dx, weight @ kernel.T, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dkernel, flat.T @ flat_weight, rtol=0, atol=2e-6 * max(len(flat), 50))


def test_bfloat16_products_are_summed_in_float32() -> None:
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(2048, 8)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(2048, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    y, pull = jax.vjp(linear, x, kernel)
    dx, dkernel = pull(weight)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.asarray(x, np.float64).T @ np.asarray(weight, np.float64)
    # Rounded to bfloat16's 8 bits the gradient would be off by 2^-9 of its size.
    np.testing.assert_allclose(dkernel, exact, rtol=2**-14, atol=1e-3)


def test_more_tokens_than_the_context_are_refused(models: dict[ModelConfig, Any]) -> None:
    with pytest.raises(ValueError, match="65 tokens do not fit the model's context of 64"):
        GPT(PLAIN).apply({"params": models[PLAIN]}, jnp.zeros((1, 65), jnp.int32))


def test_a_model_begins_as_gpt_2_does() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=64, bias=True)
    make = jax.jit(lambda key: init_params(config, key))
    params, again, other = make(jax.random.key(0)), make(jax.random.key(0)), make(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["wte"]["embedding"], other["wte"]["embedding"])
    # Those that write into the residual stream: 0.02 / sqrt(2 L), as there are 2 L of them.
    small = 0.02 / math.sqrt(2 * config.n_layer)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32
        if name.endswith("bias"):
            assert not np.any(leaf), name
        elif name.endswith("scale"):
            assert np.all(np.asarray(leaf) == 1), name
        else:
            expected = small if "c_proj" in name else 0.02
            assert float(jnp.std(leaf)) == pytest.approx(expected, rel=0.03), name
            assert abs(float(jnp.mean(leaf))) < 4 * expected / math.sqrt(leaf.size), name


def _loss_and_gradients(config: ModelConfig, params: Any, tokens: np.ndarray) -> Any:
    def loss(params: Any) -> jax.Array:
        logits = GPT(config).apply({"params": params}, tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) * jnp.arange(1, tokens.shape[1] + 1))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_and_rematerialised_layers_give_the_same_loss_and_gradients(
    remat: str, models: dict[ModelConfig, Any], tokens: np.ndarray
) -> None:
    params = models[BIASED]
    expected = _loss_and_gradients(BIASED, params, tokens)
    for layers in ("unrolled", "scanned"):
        config = dataclasses.replace(BIASED, layers=layers, remat=remat)
        given = stacked(params, BIASED.n_layer) if layers == "scanned" else params
        loss, gradients = _loss_and_gradients(config, given, tokens)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            (loss, unstacked(gradients)),
            expected,
        )


def test_stacking_is_undone_by_unstacking(models: dict[ModelConfig, Any]) -> None:
    params = models[BIASED]
    there = stacked(params, BIASED.n_layer)
    assert there["h"]["attn"]["c_attn"]["kernel"].shape == (2, 32, 3, 32)
    assert not any(name.startswith("h_") for name in there)
    jax.tree.map(np.testing.assert_array_equal, unstacked(there), params)
    assert unstacked(params) is params


def test_scanned_layers_draw_dropout_of_their_own() -> None:
    config = dataclasses.replace(PLAIN, layers="scanned", dropout=0.5, n_layer=2)
    params = init_params(config, jax.random.key(0))
    # Two layers that are alike but for what is dropped.
    params["h"] = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 2), params["h"])
    apply = jax.jit(
        lambda key: GPT(config).apply(
            {"params": params}, jnp.zeros((1, 8), int), deterministic=False, rngs={"dropout": key}
        )
    )
    first = apply(jax.random.key(1))
    np.testing.assert_array_equal(first, apply(jax.random.key(1)))
    assert not np.allclose(first, apply(jax.random.key(2)))


@pytest.mark.parametrize("segmented", [False, True], ids=["one segment", "segments"])
def test_the_fused_kernel_of_tpus_gives_plain_attention(segmented: bool) -> None:
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(2, 2, 256, 16)), jnp.float32) for _ in range(4)]
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 256))), jnp.int32) if segmented else None

    def pulled(attention: Callable[..., jax.Array]) -> Any:
        output, pull = jax.vjp(attention, *inputs[:3])
        return output, pull(inputs[3])

    fused = pulled(
        lambda q, k, v: splash_causal_attention(q, k, v, segments, residual_name="x", interpret=True)
    )
    plain = pulled(lambda *x: causal_attention(*x, backend="xla", segment_ids_BT=segments))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), fused, plain)


def test_the_gradient_of_a_lookup_adds_up_what_each_row_was_used_for() -> None:
    rng = np.random.default_rng(1)
    table, ids, weights = rng.normal(size=(7, 4)), rng.integers(0, 7, (3, 5)), rng.normal(size=(3, 5, 4))
    output, pull = jax.vjp(lambda t: lookup(t, jnp.asarray(ids), "float32"), jnp.asarray(table, jnp.float32))
    np.testing.assert_array_equal(output, table[ids].astype(np.float32))
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weights)
    np.testing.assert_allclose(pull(jnp.asarray(weights, jnp.float32))[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("requested", "dtype", "rate", "tokens", "platform", "chosen"),
    [
        ("auto", "bfloat16", 0.0, 1024, "cpu", "blocked"),
        ("auto", "bfloat16", 0.0, 1000, "nvidia", "cudnn"),
        ("auto", "float32", 0.0, 1024, "nvidia", "blocked"),
        ("auto", "bfloat16", 0.0, 1024, "gpu", "blocked"),
        ("auto", "bfloat16", 0.1, 1024, "nvidia", "blocked"),
        ("auto", "bfloat16", 0.0, 1024, "tpu", "splash"),
        ("auto", "bfloat16", 0.0, 1000, "tpu", "blocked"),
        ("auto", "bfloat16", 0.1, 1024, "tpu", "blocked"),
        ("xla", "bfloat16", 0.1, 1000, "nvidia", "xla"),
    ],
)
def test_the_backend_is_chosen_by_platform(
    requested: Any, dtype: str, rate: float, tokens: int, platform: str, chosen: str
) -> None:
    found = choose_backend(
        requested,
        dtype=dtype,
        dropout_rate=rate,
        tokens=tokens,
        head_dim=64,
        segmented=False,
        platform=platform,
    )
    assert found == chosen


@pytest.mark.parametrize(
    ("requested", "dtype", "rate", "tokens", "says"),
    [
        ("cudnn", "bfloat16", 0.1, 1024, "attention dropout 0.1"),
        ("cudnn", "float32", 0.0, 1024, "dtype=float32"),
        ("splash", "bfloat16", 0.1, 1024, "attention dropout 0.1"),
        ("splash", "bfloat16", 0.0, 1000, "rows of 1000 tokens, no multiple of 128"),
    ],
)
def test_a_fused_kernel_that_cannot_do_what_is_asked_is_refused(
    requested: Any, dtype: str, rate: float, tokens: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_backend(requested, dtype=dtype, dropout_rate=rate, tokens=tokens, head_dim=64, segmented=False)


def test_cudnn_is_not_chosen_for_what_it_does_not_take() -> None:
    given = {"dtype": "bfloat16", "dropout_rate": 0.0, "tokens": 1024, "head_dim": 64, "segmented": True}
    assert choose_backend("auto", **given, platform="nvidia") == "cudnn"
    for change in ({"tokens": 1023}, {"head_dim": 60}, {"head_dim": 256}):
        assert choose_backend("auto", **{**given, **change}, platform="nvidia") == "blocked"


@pytest.mark.parametrize("requested", ["cudnn", "splash"])
def test_a_fused_kernel_of_another_platform_is_refused(requested: Any) -> None:
    with pytest.raises(ConfigError, match=f"attention={requested} does not run on cpu devices"):
        check_platform(requested, jax.devices()[0])
    check_platform("auto", jax.devices()[0])
