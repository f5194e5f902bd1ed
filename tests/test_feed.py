"""The feed: which windows there are, in which order they come, and where a run goes on."""

import json
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.data.feed import (
    HostRows,
    TokenWindows,
    evaluation_batches,
    train_batches,
    window_starts,
)
from crystallm_jax.data.store import TokenStore
from crystallm_jax.data.writer import StoreWriter
from crystallm_jax.errors import DataError

BLOCK = 15
RECORDS = 21


def _store(folder: Path, lengths: list[int]) -> TokenStore:
    """Records of these lengths: `data_`, then random tokens that are not."""
    tokenizer = CIFTokenizer()
    data_id = tokenizer.token_to_id["data_"]
    rng = np.random.default_rng(0)
    with StoreWriter(folder) as out:
        for i, length in enumerate(lengths):
            out.add(str(i), np.concatenate([[data_id], rng.integers(0, data_id, length - 1)]))
        rows = {"train": np.arange(len(lengths))}
        out.commit(rows, sources=(), options={}, counts={}, versions={})
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    # The last record alone is too short for a window: 20 windows of the 21 starts.
    return _store(tmp_path_factory.mktemp("store"), [7 + i % 5 for i in range(RECORDS - 1)] + [BLOCK])


def _batches(store: TokenStore, **changes: Any) -> grain.DatasetIterator:
    settings = {"block_size": BLOCK, "windows": "starts", "batch_size": 4, "micro_batches": 1, "seed": 3}
    return train_batches(store, **{**settings, **changes})


def _take(batches: grain.DatasetIterator, count: int) -> np.ndarray:
    taken = np.stack([next(batches) for _ in range(count)])
    batches.close()
    return taken


def _sorted_rows(rows: np.ndarray) -> list[list[int]]:
    return sorted(rows.tolist())


def test_windows_begin_at_starts_and_run_on_into_the_next_record(store: TokenStore) -> None:
    windows = TokenWindows(store, BLOCK)
    assert len(windows) == RECORDS - 1
    for i in range(len(windows)):
        start = store.starts[i]
        np.testing.assert_array_equal(windows[i], store.tokens[start : start + BLOCK + 1])
        assert windows[i].dtype == np.uint16
        assert len(store.record(i)) < BLOCK


def test_the_last_window_ends_with_the_stream(tmp_path: Path) -> None:
    store = _store(tmp_path, [5, BLOCK + 1])
    np.testing.assert_array_equal(window_starts(store, BLOCK, "starts"), [0, 5])
    np.testing.assert_array_equal(TokenWindows(store, BLOCK)[1], store.record(1))


def test_windows_anywhere_begin_at_every_token(store: TokenStore) -> None:
    windows = TokenWindows(store, BLOCK, "anywhere")
    assert len(windows) == len(store.tokens) - BLOCK
    np.testing.assert_array_equal(windows[2], store.tokens[2 : 2 + BLOCK + 1])
    np.testing.assert_array_equal(windows[len(windows) - 1], store.tokens[-BLOCK - 1 :])


@pytest.mark.parametrize("windows", ["starts", "anywhere"])
def test_a_store_shorter_than_a_window_is_refused(windows: str, tmp_path: Path) -> None:
    store = _store(tmp_path, [8, BLOCK - 8])
    with pytest.raises(DataError, match=f"{BLOCK} tokens are fewer than one window of {BLOCK + 1}") as caught:
        _batches(store, windows=windows)
    assert str(tmp_path) in str(caught.value)


def test_every_epoch_visits_every_window_once_in_another_order(store: TokenStore) -> None:
    windows = TokenWindows(store, BLOCK)
    rows = _take(_batches(store), 15).reshape(3, RECORDS - 1, BLOCK + 1)
    for epoch in rows:
        assert _sorted_rows(epoch) == _sorted_rows(np.stack([windows[i] for i in range(len(windows))]))
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])


def test_an_epoch_need_not_end_with_a_batch(store: TokenStore) -> None:
    whole = _take(_batches(store), 12).reshape(-1, BLOCK + 1)
    uneven = _take(_batches(store, batch_size=3), 16).reshape(-1, BLOCK + 1)
    np.testing.assert_array_equal(uneven, whole)


def test_the_order_depends_on_the_seed_alone(store: TokenStore) -> None:
    once, again = _take(_batches(store), 4), _take(_batches(store), 4)
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, _take(_batches(store, seed=4), 4))


def test_micro_batches_are_consecutive_batches(store: TokenStore) -> None:
    plain = _take(_batches(store), 6)
    grouped = _take(_batches(store, micro_batches=3), 2)
    assert grouped.shape == (2, 3, 4, BLOCK + 1)
    np.testing.assert_array_equal(grouped.reshape(6, 1, 4, BLOCK + 1), plain)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_rows_that_one_host_would_read(hosts: int, store: TokenStore) -> None:
    alone = _take(_batches(store, micro_batches=2), 4)
    shares = [_take(_batches(store, micro_batches=2, host=host, hosts=hosts), 4) for host in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=2), alone)


def test_a_batch_that_does_not_divide_over_the_hosts_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="batch of 4 rows does not divide over 3 hosts"):
        _batches(store, hosts=3)


def test_a_host_counts_its_rows_of_whole_batches() -> None:
    rows = grain.MapDataset.range(10)
    share = HostRows(rows, batch_size=4, host=1, hosts=2)
    assert [share[i] for i in range(len(share))] == [2, 3, 6, 7]


@pytest.mark.parametrize("taken", [0, 3, 5, 7])
def test_a_state_continues_exactly_there(taken: int, store: TokenStore) -> None:
    straight = _take(_batches(store), taken + 8)
    first = _batches(store)
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    resumed = _batches(store)
    resumed.set_state(state)
    np.testing.assert_array_equal(_take(resumed, 8), straight[taken:])


def test_evaluation_reads_the_same_batches_every_time(store: TokenStore) -> None:
    settings = {"block_size": BLOCK, "windows": "starts", "batch_size": 4}
    once, again, other = (
        np.stack(list(evaluation_batches(store, **settings, count=3, seed=seed))) for seed in (1, 1, 2)
    )
    assert once.shape == (3, 4, BLOCK + 1)
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)
    assert len(np.unique(once.reshape(-1, BLOCK + 1), axis=0)) == 12


def test_evaluation_takes_every_window_where_there_are_fewer_than_asked_for(store: TokenStore) -> None:
    batches = list(
        evaluation_batches(store, block_size=BLOCK, windows="starts", batch_size=6, count=100, seed=1)
    )
    assert [len(batch) for batch in batches] == [6, 6, 6, 6]
    rows = np.concatenate(batches)
    assert len(np.unique(rows[: RECORDS - 1], axis=0)) == RECORDS - 1
    np.testing.assert_array_equal(rows[RECORDS - 1 :], rows[:4])
