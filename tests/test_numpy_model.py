"""The model on NumPy alone: the logits, the draws and the samples are those of JAX, and JAX is not needed."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import crystallm_jax as cl
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.model_folder import read_folder
from crystallm_jax.models.published import read_published
from crystallm_jax.models.published_names import parameter_table
from crystallm_jax.numpy_model import NumpyModel, load_numpy, save_numpy
from crystallm_jax.numpy_model.network import Network, prepare, whole_logits
from crystallm_jax.numpy_model.sampling import (
    Completion,
    Request,
    complete,
    default_batch_size,
    draw,
    sample_keys,
)
from crystallm_jax.numpy_model.threefry import bits, fold_in, gumbel, root_key, uniform
from crystallm_jax.sampling.keys import PromptKeys
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.methods import draw as jax_draw
from crystallm_jax.sampling.requests import GenerationRequest, Wanted

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=12, vocab_size=7, bias=True)
NEWLINE = 3
PACKAGED = Path(cl.__file__).parent / "assets" / "default"


def _params(config: ModelConfig, scale: float) -> dict[str, Any]:
    rng, params = np.random.default_rng(0), {}
    for entry in parameter_table(config).values():
        inner = params
        for part in entry.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[entry.path[-1]] = (scale * rng.normal(size=entry.held)).astype(np.float32)
    return params


@pytest.fixture(scope="module")
def tiny() -> Network:
    return prepare(TINY, _params(TINY, 0.5))


@pytest.fixture(scope="module")
def packaged() -> NumpyModel:
    weights = read_folder(PACKAGED)
    return NumpyModel(replace(weights.config, dtype="float32"), weights.params)


@pytest.fixture(scope="module")
def jax_model() -> Any:
    return cl.load_model("default")


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_keys_and_bits_are_those_of_jax(seed: int) -> None:
    data = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    theirs = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), data)
    ours = fold_in(root_key(seed), data)
    np.testing.assert_array_equal(ours, jax.random.key_data(theirs))
    np.testing.assert_array_equal(fold_in(root_key(seed), data[3]), ours[3])
    expected = jax.vmap(lambda key: jax.random.bits(key, (371,)))(theirs)
    np.testing.assert_array_equal(bits(ours, np.arange(371)), expected)
    some = np.array([[370, 0], [5, 5], [1, 2], [3, 4]])
    np.testing.assert_array_equal(bits(ours, some), np.take_along_axis(np.asarray(expected), some, 1))


def test_uniform_numbers_are_those_of_jax_and_gumbel_to_the_last_digits() -> None:
    keys = fold_in(root_key(1), np.arange(64, dtype=np.uint32))
    theirs = jax.random.wrap_key_data(keys)
    tiny = np.finfo(np.float32).tiny
    expected = jax.vmap(lambda key: jax.random.uniform(key, (371,), minval=tiny))(theirs)
    np.testing.assert_array_equal(uniform(keys, np.arange(371)), expected)
    expected = jax.vmap(lambda key: jax.random.gumbel(key, (371,)))(theirs)
    # Where a number is near 0, the inner logarithm's last place is many of the outer one's.
    np.testing.assert_allclose(gumbel(keys, np.arange(371)), expected, rtol=3e-7, atol=3e-7)


def test_the_keys_of_samples_are_those_of_jax() -> None:
    prompts = [np.array(tokens) for tokens in ([5, 370], [1], [5, 370], [5, 370], [2, 3, 4])]
    wanted = [Wanted(prompt, sample) for prompt in range(5) for sample in range(3)]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = PromptKeys(prompts, 2**32 - 5).of(wanted, place)
    np.testing.assert_array_equal(sample_keys(prompts, 3, 2**32 - 5).reshape(-1, 2), expected)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 10), (0.7, 3), (1.3, None), (1.0, 1), (1.0, 400)])
def test_draws_are_those_of_jax(temperature: float, top_k: int | None) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(256, 40)).astype(np.float32)
    logits[128:] = logits[128:].round()  # many ties, with the k-th too
    keys = fold_in(root_key(0), np.arange(256, dtype=np.uint32))
    method = SamplingMethod(temperature=temperature, top_k=top_k)
    expected = jax_draw(method, logits, jax.random.wrap_key_data(keys))
    for part in (slice(0, 128), slice(128, 256)):
        found = draw(logits[part], keys[part], temperature=temperature, top_k=top_k)
        np.testing.assert_array_equal(found, expected[part])


def test_logits_are_those_of_jax(packaged: NumpyModel, jax_model: Any) -> None:
    texts = [
        "data_Na4Cl4\nloop_\n_atom_type_symbol\n",
        "data_Sr1Ti1O3\n_symmetry_space_group_name_H-M Pm-3m\n",
    ]
    ids = [packaged.tokenizer.encode_cif(text) for text in texts]
    tokens = np.array([one[:7] for one in ids], np.int32)
    ours, theirs = packaged.logits(tokens), np.asarray(jax_model.logits(tokens))
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5


def test_golden_logits_and_greedy_tokens(golden: Path) -> None:
    for name in "abc":
        weights = read_published(golden / "model" / name / "ckpt.pt")
        model = NumpyModel(weights.config, weights.params)
        recorded = np.load(golden / "model" / name / "logits.npz")
        assert np.abs(model.logits(recorded["input_ids"]) - recorded["logits"]).max() < 1e-5
        if name == "a":
            greedy = np.load(golden / "sampling.npz")
            (sample,) = model.generate(str(greedy["prompt"]), top_k=1)
            # The token that follows a full context is the last: the recorded text goes on with a sliding window.
            assert list(sample.token_ids) == greedy["greedy_ids"].tolist()[:65]


def test_rounding_is_no_worse_than_that_of_jax(packaged: NumpyModel, jax_model: Any) -> None:
    # Unlikely texts have logits of up to 20, of which float32 keeps six digits, in JAX too.
    tokens = np.random.default_rng(0).integers(0, 371, (2, 7))
    network = packaged.network
    exact = jax.tree.map(lambda x: x.astype(np.float64) if isinstance(x, np.ndarray) else x, network)
    truth = whole_logits(exact, tokens)
    assert truth.dtype == np.float64
    error = np.sqrt(np.square(packaged.logits(tokens) - truth).mean())
    assert error < 2 * np.sqrt(np.square(np.asarray(jax_model.logits(tokens)) - truth).mean()) < 1e-5


def test_samples_are_those_of_jax(packaged: NumpyModel, jax_model: Any) -> None:
    prompts = [cl.make_prompt("Na4Cl4"), cl.make_prompt("Ti2O4", spacegroup="P4_2/mnm"), "data_"]
    settings = {"num_samples": 2, "seed": 5, "max_new_tokens": 40}
    ours, theirs = packaged.generate(prompts, **settings), jax_model.generate(prompts, **settings)
    for one, other in zip(ours, theirs, strict=True):
        assert one == replace(other, log_prob=one.log_prob)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-3)


def test_greedy_tokens_are_those_of_jax(packaged: NumpyModel, jax_model: Any) -> None:
    prompt = cl.make_prompt("Na4Cl4")
    (sample,) = packaged.generate(prompt, top_k=1, max_new_tokens=80)
    given, tokens = len(packaged.tokenizer.encode_cif(prompt)), np.array(sample.token_ids)
    best = np.asarray(jax_model.logits(tokens[None, :-1]))[0].argmax(-1)
    assert tokens[given:].tolist() == best[given - 1 :].tolist()


def _plain(network: Network, prompt: list[int], request: Request, key: np.ndarray) -> Completion:
    """The same without a cache and by itself."""
    tokens, log_prob, finished = list(prompt), 0.0, False
    while len(tokens) <= network.config.block_size and not finished:
        logits = whole_logits(network, np.array([tokens]))[:, -1]
        keys = fold_in(key[None], np.array([len(tokens)]))
        tokens += draw(logits, keys, temperature=request.temperature, top_k=request.top_k).tolist()
        log_prob += float(np.log(np.exp(logits[0]) / np.exp(logits[0]).sum())[tokens[-1]])
        finished = tokens[-2:] == [NEWLINE, NEWLINE] and len(tokens) >= len(prompt) + 2
        if len(tokens) == len(prompt) + (request.max_new_tokens or 99):
            break
    return Completion(0, 0, tuple(tokens), log_prob, finished, 0.0)


@pytest.mark.parametrize("batch_size", [1, 5, None])
@pytest.mark.parametrize("request_", [Request(4, seed=3), Request(3, 0.8, 2, 4), Request(1, top_k=1)])
def test_samples_equal_an_uncached_loop_whatever_the_batch(
    batch_size: int | None, request_: Request, tiny: Network
) -> None:
    # Of different lengths, one twice, one that ends in a newline, one that fills the context.
    prompts = [[1, 2], [5], [1, 2], [6, NEWLINE], [0] * TINY.block_size, [4, 4, 4, 4, 4]]
    encoded = [np.array(prompt) for prompt in prompts]
    found = complete(tiny, encoded, newline_id=NEWLINE, request=replace(request_, batch_size=batch_size))
    by_name = {(one.prompt_index, one.sample_index): one for one in found}
    keys = sample_keys(encoded, request_.num_samples, request_.seed)
    assert len(by_name) == len(prompts) * request_.num_samples
    for (prompt, sample), one in by_name.items():
        expected = _plain(tiny, prompts[prompt], request_, keys[prompt, sample])
        assert one.token_ids == expected.token_ids
        assert one.finished == expected.finished
        assert one.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    if request_.top_k == 10:
        assert {one.finished for one in by_name.values()} == {True, False}


def test_batches_of_large_models_are_smaller() -> None:
    large = ModelConfig(n_layer=16, n_head=16, n_embd=1024, block_size=2048)
    assert 1 <= default_batch_size(large) < default_batch_size(TINY)
    assert default_batch_size(replace(large, n_layer=1000)) == 1


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"constrain": "syntax"}, "load_model"),
        ({"overflow": "slide"}, "load_model"),
        ({"prompts": "Na4Cl4"}, "data_"),
        ({"prompts": "data_Xx1\n"}, "vocabulary lacks"),
        ({"prompts": "data_" * 1100}, "1024"),
    ],
)
def test_what_cannot_be_sampled_is_refused(settings: dict[str, Any], part: str, packaged: NumpyModel) -> None:
    with pytest.raises(cl.SamplingError, match=part) as caught:
        packaged.generate(**{"prompts": "data_", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"num_samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"seed": -1}, {"seed": 2**32}],
)
def test_settings_are_refused_as_jax_refuses_them(settings: dict[str, Any]) -> None:
    with pytest.raises(cl.SamplingError) as ours:
        Request(**settings)
    with pytest.raises(cl.SamplingError) as theirs:
        GenerationRequest(**settings)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": float("nan")}, {"top_k": 0}])
def test_methods_are_refused_as_jax_refuses_them(settings: dict[str, Any]) -> None:
    with pytest.raises(cl.SamplingError) as ours:
        Request(**settings)
    with pytest.raises(cl.SamplingError) as theirs:
        SamplingMethod(**settings)
    assert str(ours.value) == str(theirs.value)


def test_tokens_that_the_model_cannot_read_are_refused(packaged: NumpyModel) -> None:
    for tokens, part in (
        ([1, 2], "B, T"),
        ([[1.5]], "integers"),
        ([[371]], "370"),
        ([[-1]], "370"),
        (np.zeros((1, 1025), int), "1024"),
    ):
        with pytest.raises(cl.ModelError, match=part):
            packaged.logits(np.array(tokens))
    assert packaged.logits(np.zeros((0, 4), int)).shape == (0, 4, 371)
    assert packaged.logits(np.zeros((2, 0), int)).shape == (2, 0, 371)


def test_a_model_goes_through_a_file_from_either_kind(
    tmp_path: Path, packaged: NumpyModel, jax_model: Any
) -> None:
    save_numpy(jax_model, tmp_path / "jax.npz")
    loaded = load_numpy(tmp_path / "jax.npz")
    assert loaded.num_params == jax_model.num_params
    assert loaded.config.dtype == "float32"
    assert loaded.name == str(tmp_path / "jax.npz")
    cl.save_numpy(loaded, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "jax.npz").read_bytes()
    tokens = np.array([[5, 6, 7]])
    np.testing.assert_array_equal(
        cl.load_numpy(tmp_path / "again.npz").logits(tokens), packaged.logits(tokens)
    )


_WITHOUT_JAX = """
import sys
import crystallm_jax as cl
heavy = {"jax", "jaxlib", "flax", "torch", "optax", "orbax", "pymatgen", "scipy"}
model = cl.load_numpy(sys.argv[1])
assert model.logits([[1, 2, 3]]).shape == (1, 3, 371)
assert not heavy & set(sys.modules), heavy & set(sys.modules)
samples = model.generate(cl.make_prompt("Na4Cl4", spacegroup="Fm-3m"), num_samples=4, top_k=5)
assert all(sample.cif.startswith("data_Na4Cl4") for sample in samples)
valid = [sample for sample in samples if sample.validate().valid]
assert valid, [sample.text for sample in samples]
assert len(valid[0].structure()) == 8
assert not (heavy - {"pymatgen", "scipy"}) & set(sys.modules), set(sys.modules)
"""


def test_a_model_runs_without_jax(tmp_path: Path, packaged: NumpyModel) -> None:
    save_numpy(packaged, tmp_path / "model.npz")
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_JAX, str(tmp_path / "model.npz")],
        env=environment | {"OPENBLAS_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
