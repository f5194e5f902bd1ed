"""How a token is drawn: the temperature, which tokens can be drawn at all, and how often each is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.methods import SamplingMethod, draw, filtered_logits

GREEDY = SamplingMethod(top_k=1)
# Of these logits the probabilities are the shares.
SHARES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


def _drawable(method: SamplingMethod, logits: np.ndarray) -> list[int]:
    """Tokens that can be drawn."""
    return np.flatnonzero(np.isfinite(filtered_logits(method, jnp.asarray(logits, jnp.float32)))).tolist()


def test_filtered_logits_keep_the_k_best_over_the_temperature() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 371)).astype(np.float32)
    kept = np.asarray(filtered_logits(SamplingMethod(0.5, 10), jnp.asarray(logits)))
    for row, out in zip(logits, kept, strict=True):
        best = np.argsort(row)[-10:]
        np.testing.assert_allclose(out[best], row[best] / 0.5, rtol=1e-6)
        assert np.isneginf(np.delete(out, best)).all()


def test_ties_at_the_kth_logit_are_kept() -> None:
    logits = jnp.array([3.0, 1.0, 2.0, 1.0, 1.0, 0.0])
    assert np.isfinite(filtered_logits(SamplingMethod(1.0, 3), logits)).tolist() == [1, 1, 1, 1, 1, 0]
    assert np.isfinite(filtered_logits(SamplingMethod(1.0, 2), logits)).tolist() == [1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("top_k", [None, 6, 1000])
def test_all_tokens_can_be_drawn_without_top_k_or_beyond_the_vocabulary(top_k: int | None) -> None:
    logits = jnp.arange(6.0)
    assert filtered_logits(SamplingMethod(2.0, top_k), logits).tolist() == (logits / 2).tolist()


def test_draws_follow_the_probabilities() -> None:
    logits = jnp.array([0.3, -1.0, 1.1, 0.3, -4.0])
    rows, method = 20_000, SamplingMethod(0.7, 3)
    keys = jax.random.split(jax.random.key(0), rows)
    counts = np.bincount(draw(method, jnp.broadcast_to(logits, (rows, 5)), keys), minlength=5)
    expected = np.asarray(jax.nn.softmax(filtered_logits(method, logits)))
    assert counts[[1, 4]].tolist() == [0, 0]
    assert np.all(np.abs(counts - rows * expected) <= 4 * np.sqrt(rows * expected))


def test_greedy_takes_the_first_of_equals_whatever_the_key() -> None:
    logits = jnp.array([[0.0, 2.0, 1.0, 2.0]] * 8)
    assert draw(GREEDY, logits, jax.random.split(jax.random.key(1), 8)).tolist() == [1] * 8


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_add_up_to_it(top_p: float, kept: list[int]) -> None:
    assert _drawable(SamplingMethod(top_k=None, top_p=top_p), np.log(SHARES)) == kept


def test_top_p_is_of_the_probabilities_at_the_temperature() -> None:
    logits = np.log(SHARES)
    # Squared shares: 0.16 of 0.285 is 0.56.
    assert _drawable(SamplingMethod(0.5, None, 0.55), logits) == [1]
    assert _drawable(SamplingMethod(1.0, None, 0.55), logits) == [1, 3]
    kept = filtered_logits(SamplingMethod(0.5, None, 0.6), jnp.asarray(logits))
    np.testing.assert_allclose(np.asarray(kept)[[1, 3]], logits[[1, 3]] / 0.5, rtol=1e-6)


def test_ties_with_the_last_of_top_p_are_kept() -> None:
    assert _drawable(SamplingMethod(top_k=None, top_p=0.5), np.log([0.2, 0.4, 0.2, 0.2])) == [0, 1, 2, 3]
    assert _drawable(SamplingMethod(top_k=None, top_p=0.1), np.zeros(4)) == [0, 1, 2, 3]


def test_top_p_counts_what_top_k_leaves() -> None:
    logits = np.log(SHARES)
    # Of the best two 0.4 is 4 / 7: enough for 0.57, but not among all five.
    assert _drawable(SamplingMethod(top_k=2, top_p=0.57), logits) == [1]
    assert _drawable(SamplingMethod(top_k=None, top_p=0.57), logits) == [1, 3]
    assert _drawable(SamplingMethod(top_k=2, top_p=0.99), logits) == [1, 3]


def test_top_p_of_one_is_none() -> None:
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 371)) * 8, jnp.float32)
    for top_k in (None, 10):
        np.testing.assert_array_equal(
            filtered_logits(SamplingMethod(0.7, top_k, 1.0), logits),
            filtered_logits(SamplingMethod(0.7, top_k), logits),
        )


def test_top_p_treats_each_row_by_itself() -> None:
    rows = np.log(np.stack([SHARES, SHARES[::-1]]))
    kept = np.isfinite(filtered_logits(SamplingMethod(top_k=None, top_p=0.6), jnp.asarray(rows)))
    assert kept.tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]]


def test_excluded_tokens_are_never_drawn_and_the_others_share_what_is_left() -> None:
    logits, rows = np.log(SHARES), 20_000
    method = SamplingMethod(top_k=3, excluded=(1, 2))
    assert _drawable(method, logits) == [0, 3, 4]
    # Excluded first, then the best: otherwise fewer than k could be drawn, and less than top_p.
    assert _drawable(SamplingMethod(top_k=1, excluded=(1,)), logits) == [3]
    assert _drawable(SamplingMethod(top_k=None, top_p=0.6, excluded=(1,)), logits) == [3, 4]
    keys = jax.random.split(jax.random.key(3), rows)
    many = jnp.broadcast_to(jnp.asarray(logits), (rows, 5))
    counts = np.bincount(draw(method, many, keys), minlength=5)
    expected = rows * np.array([0.1, 0, 0, 0.3, 0.15]) / 0.55
    assert counts[[1, 2]].tolist() == [0, 0]
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected))


def test_greedy_leaves_excluded_tokens_out() -> None:
    keys = jax.random.split(jax.random.key(1), 1)
    method = SamplingMethod(top_k=1, excluded=(1, 3))
    assert draw(method, jnp.log(SHARES)[None], keys).tolist() == [4]


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.01, float("nan")])
def test_impossible_top_p_is_refused(top_p: float) -> None:
    with pytest.raises(SamplingError, match=r"top_p=.*: must be above 0 and at most 1"):
        SamplingMethod(top_p=top_p)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(SamplingError, match=r"temperature=.*: must be"):
        SamplingMethod(temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -1])
def test_impossible_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(SamplingError, match=f"top_k={top_k}: must be at least 1"):
        SamplingMethod(top_k=top_k)
