"""Sampling: the tokens that the model's own probabilities ask for, whatever the batch, and where a sample ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.api import load_model
from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.errors import SamplingError
from crystallm_jax.model import ModelConfig
from crystallm_jax.models.published_names import parameter_table
from crystallm_jax.sampling import reader
from crystallm_jax.sampling.decode import decoder
from crystallm_jax.sampling.generate import generate
from crystallm_jax.sampling.methods import SamplingMethod, filtered_logits
from crystallm_jax.sampling.requests import Completion, GenerationRequest

GREEDY = SamplingMethod(top_k=1)
DRAWN = SamplingMethod(temperature=0.8, top_k=10)
# The shape of golden model a, so that the two share what is compiled.
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=371)
# Few tokens, so that two newlines come by chance.
FEW_TOKENS = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=12)
LONG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=256, vocab_size=371)
NEWLINE, WORD = CIFTokenizer().token_to_id["\n"], 4
NEWLINE_OF_FEW = 7
PROMPTS = [np.arange(n) * 7 % 12 for n in (9, 3, 40, 17, 9)]


def _random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters large enough that no two logits are close; float32."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for entry in parameter_table(config).values():
        place = params
        for part in entry.path[:-1]:
            place = place.setdefault(part, {})
        spread = 0.3 if entry.path[-1] == "scale" else 0.12 if entry.path[-1] == "embedding" else 0.2
        noise = spread * rng.standard_normal(entry.held)
        place[entry.path[-1]] = (noise + (entry.path[-1] == "scale")).astype(np.float32)
    return jax.device_put(params)


def _scripted_params(config: ModelConfig, token_at: Callable[[int], int]) -> dict[str, Any]:
    """A model without attention that, whatever it read, puts `token_at(n)` at position n."""
    params = jax.tree.map(np.zeros_like, jax.device_get(_random_params(config, 0)))
    for name in ("ln_1", "ln_2"):
        for layer in range(config.n_layer):
            params[f"h_{layer}"][name]["scale"] += 1
    params["ln_f"]["scale"] += 1
    script = [token_at(position + 1) for position in range(config.block_size)]
    direction = {token: n for n, token in enumerate(dict.fromkeys(script))}
    for token, n in direction.items():
        params["wte"]["embedding"][token, n] = 1
    for position, token in enumerate(script):
        params["wpe"]["embedding"][position, direction[token]] = 10
    return jax.device_put(params)


def _numpy_logits(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """The forward pass over one text [T], float64 [T, V], without a cache and without JAX."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    T, H = len(tokens), config.n_head

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][:T]
    for layer in range(config.n_layer):
        block = params[f"h_{layer}"]
        qkv = norm(x, block["ln_1"]["scale"]) @ block["attn"]["c_attn"]["kernel"].reshape(config.n_embd, -1)
        q, k, v = (part.reshape(T, H, -1).swapaxes(0, 1) for part in np.split(qkv, 3, axis=-1))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(T, -1)
        x = x + mixed @ block["attn"]["c_proj"]["kernel"]
        hidden = norm(x, block["ln_2"]["scale"]) @ block["mlp"]["c_fc"]["kernel"]
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + hidden @ block["mlp"]["c_proj"]["kernel"]
    return norm(x, params["ln_f"]["scale"]) @ params["wte"]["embedding"].T


def _numpy_greedy(config: ModelConfig, params: dict[str, Any], prompt: np.ndarray, new: int) -> list[int]:
    """Greedy tokens as the published generator finds them: each from the last `block_size` alone."""
    tokens = prompt.tolist()
    for _ in range(new):
        tokens.append(int(_numpy_logits(config, params, np.array(tokens[-config.block_size :]))[-1].argmax()))
    return tokens


def _complete(
    config: ModelConfig, params: dict[str, Any], prompts: list[np.ndarray], **settings: Any
) -> list[Completion]:
    request = GenerationRequest(**{"method": GREEDY, **settings})
    newline_id = NEWLINE_OF_FEW if config == FEW_TOKENS else NEWLINE
    batches = generate(config, params, prompts, newline_id=newline_id, request=request)
    return sorted(completion for batch in batches for completion in batch)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return _random_params(CONFIG, 0)


@pytest.fixture(scope="module")
def few_params() -> dict[str, Any]:
    return _random_params(FEW_TOKENS, 1)


@pytest.fixture(scope="module")
def drawn(few_params: dict[str, Any]) -> list[Completion]:
    """Two samples of each of five prompts, the last one a repetition of the first; eight rows a batch."""
    return _complete(FEW_TOKENS, few_params, PROMPTS, method=DRAWN, num_samples=2, seed=5, batch_size=8)


def _texts(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"overflow": "wrap"},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_impossible_requests_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=f"{next(iter(wrong))}=.*: must be"):
        GenerationRequest(**wrong)


# Greedy, against a plain forward pass and against the published tokens.


def test_greedy_equals_an_uncached_loop_beyond_the_context(params: dict[str, Any]) -> None:
    prompt = np.array([20, 301, 45, 7, 99, 5])
    (slid,) = _complete(CONFIG, params, [prompt], max_new_tokens=60, overflow="slide")
    assert list(slid.token_ids) == _numpy_greedy(CONFIG, params, prompt, 60)
    (stopped,) = _complete(CONFIG, params, [prompt], overflow="stop")
    assert stopped.token_ids == slid.token_ids[:65]
    assert not stopped.finished


def test_rows_slide_beside_rows_that_are_done(params: dict[str, Any]) -> None:
    prompts = [np.array([20, 301, 45, 7, 99, 5]), np.array([8, 30, 2])]
    rows = _complete(CONFIG, params, prompts, max_new_tokens=60, overflow="slide")
    assert [list(row.token_ids) for row in rows] == [_numpy_greedy(CONFIG, params, p, 60) for p in prompts]
    assert [len(row.token_ids) for row in rows] == [66, 63]


def test_long_texts_take_one_compiled_reading_and_step() -> None:
    params = _random_params(LONG, 2)
    before = reader._read_columns._cache_size(), decoder("cpu")._cache_size()
    prompts = [np.arange(5) * 31 + 9, *(np.arange(n) * 13 % 371 for n in (20, 33))]
    for row in _complete(LONG, params, prompts, batch_size=4):
        tokens = np.array(row.token_ids)
        assert len(tokens) == LONG.block_size + 1
        best = _numpy_logits(LONG, params, tokens[:-1]).argmax(axis=-1)
        first = len(prompts[row.prompt_index])
        assert tokens[first:].tolist() == best[first - 1 :].tolist()
    # One reading, of 64 columns.
    assert (reader._read_columns._cache_size() - before[0], decoder("cpu")._cache_size() - before[1]) == (
        1,
        1,
    )
    other = [prompts[1][:19], prompts[0] + 1, prompts[2] + 1]
    _complete(LONG, params, other, seed=3, batch_size=4, max_new_tokens=LONG.block_size - 50)
    assert (reader._read_columns._cache_size() - before[0], decoder("cpu")._cache_size() - before[1]) == (
        1,
        1,
    )


def test_golden_greedy_tokens(golden: Path) -> None:
    recorded = np.load(golden / "sampling.npz")
    model = load_model(golden / "model" / "a" / "ckpt.pt")
    prompt = str(recorded["prompt"])
    assert model.tokenizer.encode_cif(prompt).tolist() == recorded["prompt_ids"].tolist()
    (slid,) = model.generate(prompt, top_k=1, max_new_tokens=60, overflow="slide")
    assert list(slid.token_ids) == recorded["greedy_ids"].tolist()
    (stopped,) = model.generate(prompt, top_k=1)
    assert list(stopped.token_ids) == recorded["greedy_ids"].tolist()[:65]


def test_golden_next_token_distribution(golden: Path) -> None:
    recorded = np.load(golden / "sampling.npz")
    model = load_model(golden / "model" / "a" / "ckpt.pt")
    logits = model.logits(recorded["prompt_ids"][None])[0, -1]
    np.testing.assert_allclose(logits, recorded["prompt_last_logits"], atol=1e-5, rtol=0)
    probabilities = jax.nn.softmax(filtered_logits(DRAWN, logits))
    np.testing.assert_allclose(probabilities, recorded["topk10_t08_probs"], atol=1e-5, rtol=0)


# Where a sample ends.


def _script(text: str, start: int) -> Callable[[int], int]:
    """Positions from `start` on take the tokens of `text`, `n` for a newline; then words alone."""
    tokens = {start + i: NEWLINE if letter == "n" else WORD for i, letter in enumerate(text)}
    return lambda position: tokens.get(position, WORD)


@pytest.mark.parametrize(
    ("prompt", "script", "length"),
    [
        ([9, 9, 9], "wwnn", 7),
        ([9, 9, 9], "nwnwnn", 9),
        ([9, 9, 9], "nn", 5),
        ([9, 9, NEWLINE], "nwnn", 7),
        ([9, 9, NEWLINE], "nn", 5),
        ([9, NEWLINE, NEWLINE], "wnn", 6),
        ([9, 9, 9], "nnnn", 5),
    ],
)
def test_two_generated_newlines_end_a_sample(prompt: list[int], script: str, length: int) -> None:
    params = _scripted_params(CONFIG, _script(script, len(prompt)))
    (row,) = _complete(CONFIG, params, [np.array(prompt)])
    assert row.finished
    assert list(row.token_ids) == prompt + [NEWLINE if c == "n" else WORD for c in script][: length - 3]


def test_without_an_end_a_sample_stops_unfinished_behind_the_context() -> None:
    params = _scripted_params(CONFIG, _script("nw" * 32, 3))
    (row,) = _complete(CONFIG, params, [np.array([9, 9, 9])])
    assert not row.finished
    assert row.token_ids == (9, 9, 9, *(NEWLINE, WORD) * 31)


def test_newlines_as_the_very_last_tokens_still_end_it() -> None:
    params = _scripted_params(CONFIG, _script("nn", CONFIG.block_size - 1))
    (row,) = _complete(CONFIG, params, [np.array([9, 9, 9])])
    assert row.finished
    assert len(row.token_ids) == CONFIG.block_size + 1
    cut = _complete(CONFIG, params, [np.array([9, 9, 9])], max_new_tokens=CONFIG.block_size - 3)[0]
    assert not cut.finished
    assert cut.token_ids == row.token_ids[:-1]


def test_a_full_context_gives_one_token_more(params: dict[str, Any]) -> None:
    prompt = np.arange(CONFIG.block_size) * 5 % 371
    (row,) = _complete(CONFIG, params, [prompt])
    assert list(row.token_ids) == _numpy_greedy(CONFIG, params, prompt, 1)


def test_max_new_tokens_only_cuts(params: dict[str, Any]) -> None:
    prompt = np.array([20, 301, 45, 7, 99, 5])
    (whole,) = _complete(CONFIG, params, [prompt])
    for count in (1, 2, 17, 10_000):
        (cut,) = _complete(CONFIG, params, [prompt], max_new_tokens=count)
        assert cut.token_ids == whole.token_ids[: 6 + count]
        assert not cut.finished


@pytest.mark.parametrize("length", [0, CONFIG.block_size + 1])
def test_prompts_that_do_not_fit_are_refused(params: dict[str, Any], length: int) -> None:
    with pytest.raises(SamplingError, match=f"prompt 1 has {length} tokens.* takes 1 to 64"):
        _complete(CONFIG, params, [np.array([9]), np.zeros(length, int)])


def test_no_prompts_no_samples(params: dict[str, Any]) -> None:
    assert _complete(CONFIG, params, []) == []


# Randomness: a function of seed, prompt and sample index.


def test_samples_are_what_the_probabilities_allow(
    drawn: list[Completion], few_params: dict[str, Any]
) -> None:
    assert {row.finished for row in drawn} == {True, False}
    for row in drawn:
        tokens, first = np.array(row.token_ids), len(PROMPTS[row.prompt_index])
        assert tokens[:first].tolist() == PROMPTS[row.prompt_index].tolist()
        logits = _numpy_logits(FEW_TOKENS, few_params, tokens[:-1])[first - 1 :]
        new = tokens[first:]
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        # Temperature 1 and all tokens, though drawn at 0.8 from ten.
        np.testing.assert_allclose(row.log_prob, log_probs[np.arange(len(new)), new].sum(), atol=1e-4)
        rank = (logits > logits[np.arange(len(new)), new][:, None]).sum(axis=-1)
        assert rank.max() < 10
        ends = np.flatnonzero((new[1:] == NEWLINE_OF_FEW) & (new[:-1] == NEWLINE_OF_FEW))
        assert ends.tolist() == ([len(new) - 2] if row.finished else [])
        assert row.finished or len(tokens) == FEW_TOKENS.block_size + 1


def test_a_row_of_equal_logits_gives_every_token_alike() -> None:
    # All twelve tie with the tenth. Tokens of one row, and rows of one prompt, are independent.
    uniform = jax.tree.map(jnp.zeros_like, _random_params(FEW_TOKENS, 0))
    rows = _complete(FEW_TOKENS, uniform, [PROMPTS[1]], method=DRAWN, num_samples=40, batch_size=8)
    tokens = np.concatenate([row.token_ids[3:] for row in rows])
    assert len(tokens) > 1000
    expected = len(tokens) / 12
    assert np.all(np.abs(np.bincount(tokens, minlength=12) - expected) < 4 * np.sqrt(expected))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_changes_no_sample(
    drawn: list[Completion], few_params: dict[str, Any], batch_size: int
) -> None:
    again = _complete(
        FEW_TOKENS, few_params, PROMPTS, method=DRAWN, num_samples=2, seed=5, batch_size=batch_size
    )
    assert [row[:3] for row in again] == [row[:3] for row in drawn]
    assert [row.finished for row in again] == [row.finished for row in drawn]
    np.testing.assert_allclose([r.log_prob for r in again], [r.log_prob for r in drawn], atol=1e-4)


def test_other_orders_and_other_company_change_no_sample(
    drawn: list[Completion], few_params: dict[str, Any]
) -> None:
    settings = {"method": DRAWN, "seed": 5, "batch_size": 5}
    others = [np.array([1, 2]), np.arange(30) % 5]
    order = [3, 2, 1, 0, 4]
    mixed = [others[0], *(PROMPTS[i] for i in order), others[1]]
    rows = _complete(FEW_TOKENS, few_params, mixed, num_samples=3, **settings)
    found = {(row.prompt_index, row.sample_index): row.token_ids for row in rows}
    for place, index in enumerate(order, start=1):
        for sample in (0, 1):
            assert found[place, sample] == _texts(drawn)[2 * index + sample]


def test_repeated_prompts_and_samples_differ_from_each_other(drawn: list[Completion]) -> None:
    of_one_prompt = [row.token_ids for row in drawn if row.prompt_index in (0, 4)]
    assert len(set(of_one_prompt)) == 4


def test_seeds_repeat_and_differ(drawn: list[Completion], few_params: dict[str, Any]) -> None:
    settings = {"method": DRAWN, "num_samples": 2, "batch_size": 8}
    assert _texts(_complete(FEW_TOKENS, few_params, PROMPTS, seed=5, **settings)) == _texts(drawn)
    other = _texts(_complete(FEW_TOKENS, few_params, PROMPTS, seed=6, **settings))
    assert not set(other) & set(_texts(drawn))


def test_greedy_does_not_depend_on_the_seed(params: dict[str, Any]) -> None:
    prompt = np.array([20, 301, 45])
    rows = [_complete(CONFIG, params, [prompt], seed=seed)[0] for seed in (0, 1)]
    assert rows[0]._replace(seconds=0) == rows[1]._replace(seconds=0)


def test_samples_come_as_they_are_done_and_steps_are_compiled_once(few_params: dict[str, Any]) -> None:
    def names(prompts: list[np.ndarray], seed: int, max_new_tokens: int) -> list[tuple[int, int]]:
        request = GenerationRequest(
            method=DRAWN, num_samples=2, seed=seed, batch_size=5, max_new_tokens=max_new_tokens
        )
        batches = list(generate(FEW_TOKENS, few_params, prompts, newline_id=NEWLINE_OF_FEW, request=request))
        assert all(batches)
        assert len(batches) > 1
        return sorted(row[:2] for batch in batches for row in batch)

    def all_of(prompts: int) -> list[tuple[int, int]]:
        return [(prompt, sample) for prompt in range(prompts) for sample in (0, 1)]

    assert names(PROMPTS[:4], 0, 7) == all_of(4)
    before = decoder("cpu")._cache_size()
    assert names(PROMPTS[::-1], 1, 20) == all_of(5)
    assert names([PROMPTS[0][:2]] * 3, 2, 3) == all_of(3)
    assert decoder("cpu")._cache_size() == before
