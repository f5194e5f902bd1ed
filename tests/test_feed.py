"""The feed: which rows there are, in which order they come, and where a run goes on."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.data.feed import Feed, open_feed
from crystallm_jax.data.packing import Batch
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.rows import PackedRows, WindowRows, evaluation_batches, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError

BLOCK = 15
RECORDS = 21
MARKED = (2, 5, 11)


def _store(folder: Path, lengths: list[int], marked: tuple[int, ...] = ()) -> TokenStore:
    """Records of these lengths: `data_`, then random tokens that are not."""
    data_id = CIFTokenizer().token_to_id["data_"]
    rng = np.random.default_rng(0)
    with StoreWriter(folder) as out:
        for i, length in enumerate(lengths):
            tokens = np.concatenate([[data_id], rng.integers(0, data_id, length - 1)])
            out.add(str(i), tokens, underrepresented=i in marked)
        out.commit(sources=(), options={}, counts={}, versions={})
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    # The last record alone is too short for a window: 20 windows of the 21 starts.
    lengths = [7 + i % 5 for i in range(RECORDS - 1)] + [BLOCK]
    return _store(tmp_path_factory.mktemp("store"), lengths, MARKED)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return _store(tmp_path_factory.mktemp("larger"), [6 + i % 7 for i in range(400)], tuple(range(3, 400, 9)))


def _feed(store: TokenStore, **changes: Any) -> Feed:
    chosen = {"block_size": BLOCK, "windows": "starts", "batch_size": 4, "micro_batches": 1, "seed": 3}
    return open_feed(store, **{**chosen, **changes})


def _joined(batches: list[Batch], axis: int | None = None) -> Batch:
    """Batches one after another, or side by side along an axis."""
    join = np.stack if axis is None else lambda leaves: np.concatenate(leaves, axis)
    return Batch(*(None if leaves[0] is None else join(leaves) for leaves in zip(*batches, strict=True)))


def _take(feed: Iterator[Batch], count: int) -> Batch:
    taken = _joined([next(feed) for _ in range(count)])
    if isinstance(feed, Feed):
        feed.close()
    return taken


def _assert_equal(found: Batch, expected: Batch) -> None:
    for name, one, other in zip(Batch._fields, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=name)


def _rows(batch: Batch) -> Batch:
    return Batch(*(None if leaf is None else leaf.reshape(-1, leaf.shape[-1]) for leaf in batch))


def _all(rows: WindowRows | PackedRows) -> Batch:
    return rows.read(np.arange(len(rows)))


def _open(store: TokenStore, windows: str = "starts", block_size: int = BLOCK) -> WindowRows | PackedRows:
    return open_rows(store, block_size=block_size, windows=windows, seed=3)


def test_windows_begin_at_starts_and_run_on_into_the_next_record(store: TokenStore) -> None:
    rows = _all(_open(store))
    assert rows.tokens.shape == (RECORDS - 1, BLOCK + 1)
    assert rows.tokens.dtype == np.uint16
    assert rows[1:] == (None, None, None)
    for i, window in enumerate(rows.tokens):
        start = store.starts[i]
        np.testing.assert_array_equal(window, store.tokens[start : start + BLOCK + 1])
        assert len(store.record(i)) < BLOCK


def test_the_last_window_ends_with_the_stream(tmp_path: Path) -> None:
    store = _store(tmp_path, [5, BLOCK + 1])
    rows = _open(store)
    assert len(rows) == 2
    np.testing.assert_array_equal(_all(rows).tokens[1], store.record(1))


def test_windows_anywhere_begin_at_every_token(store: TokenStore) -> None:
    rows = _open(store, "anywhere")
    assert len(rows) == len(store.tokens) - BLOCK
    found = _all(rows).tokens
    np.testing.assert_array_equal(found[2], store.tokens[2 : 2 + BLOCK + 1])
    np.testing.assert_array_equal(found[-1], store.tokens[-BLOCK - 1 :])


@pytest.mark.parametrize("windows", ["starts", "anywhere"])
def test_a_store_shorter_than_a_window_is_refused(windows: str, tmp_path: Path) -> None:
    store = _store(tmp_path, [8, BLOCK - 8])
    with pytest.raises(DataError, match=f"{BLOCK} tokens are fewer than one window of {BLOCK + 1}") as caught:
        _feed(store, windows=windows)
    assert str(tmp_path) in str(caught.value)


def test_more_windows_than_can_be_numbered_are_refused(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crystallm_jax.data.rows._MOST_ROWS", 30)
    assert len(_open(store)) == RECORDS - 1
    with pytest.raises(DataError, match="more than can be numbered: set windows=starts"):
        _open(store, "anywhere")


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=30),
    block_size=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_packed_rows_hold_every_record_once_as_it_is(
    lengths: list[int], block_size: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = _store(tmp_path_factory.mktemp("packed"), lengths)
    rows = open_rows(store, block_size=block_size, windows="packed", seed=seed)
    numbers = np.random.default_rng(seed).permutation(len(rows))
    tokens, segments, positions, mask = rows.read(numbers)
    assert tokens.shape == (len(rows), block_size + 1)
    assert segments.shape == positions.shape == mask.shape == (len(rows), block_size)
    assert (tokens.dtype, segments.dtype, positions.dtype, mask.dtype) == (
        np.uint16,
        np.uint16,
        np.uint16,
        bool,
    )
    found = []
    for row in range(len(rows)):
        # What is read of a record, by its segment; its last token may be a target alone.
        place = 0
        for segment in range(1, segments[row].max(initial=0) + 1):
            held = np.flatnonzero(segments[row] == segment)
            np.testing.assert_array_equal(held, np.arange(place, place + len(held)))
            np.testing.assert_array_equal(positions[row, held], np.arange(len(held)))
            targets = np.flatnonzero(mask[row, held])
            np.testing.assert_array_equal(targets, np.arange(len(targets)))
            assert len(targets) in {len(held) - 1, len(held)}
            if len(targets) == len(held):
                assert held[-1] == block_size - 1
            place += len(targets) + 1
            found.append(tokens[row, held[0] : place].tolist())
        if place == block_size:
            # A record of one token may stand last: it is neither read nor counted.
            last = tokens[row, place:].tolist()
            found += [last] if last == [CIFTokenizer().token_to_id["data_"]] else []
        else:
            assert not tokens[row, place:].any()
            assert not segments[row, place:].any()
            assert not mask[row, place:].any()
    expected = [store.record(i)[: block_size + 1].tolist() for i in range(len(store))]
    assert sorted(found) == sorted(expected)
    assert rows.truncated == sum(length > block_size + 1 for length in lengths)


def test_a_packed_row_is_what_it_says(tmp_path: Path) -> None:
    store = _store(tmp_path, [6, 4, 5])
    rows = open_rows(store, block_size=11, windows="packed", seed=0)
    found = rows.read(np.array([0]))
    first, second, last = store.record(0), store.record(2), store.record(1)
    assert found.tokens[0].tolist() == [*first.tolist(), *second.tolist(), 0]
    assert found.segment_ids[0].tolist() == [1] * 6 + [2] * 5
    assert found.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert found.loss_mask[0].tolist() == [True] * 5 + [False] + [True] * 4 + [False]
    other = rows.read(np.array([1]))
    assert other.tokens[0].tolist() == [*last.tolist(), *[0] * 8]
    assert other.segment_ids[0].tolist() == [1] * 4 + [0] * 7
    assert other.loss_mask[0].tolist() == [True] * 3 + [False] * 8


def test_records_longer_than_a_row_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = _store(tmp_path, [BLOCK + 1, BLOCK + 2, 3, 40])
    with caplog.at_level(logging.WARNING):
        taken = _take(_feed(store, windows="packed", batch_size=1), 9)
    assert caplog.messages == [
        f"{tmp_path}: 2 of 4 records are longer than block_size=15: their first 16 tokens are read"
    ]
    rows = {tuple(row) for row in _rows(taken).tokens.tolist()}
    assert tuple(store.record(3)[: BLOCK + 1].tolist()) in rows


@pytest.mark.parametrize("windows", ["starts", "packed"])
def test_every_epoch_visits_every_row_once_in_another_order(windows: str, store: TokenStore) -> None:
    expected = _all(_open(store, windows)).tokens
    count = len(expected)
    taken = _rows(_take(_feed(store, windows=windows, batch_size=1), 3 * count)).tokens
    epochs = taken.reshape(3, count, BLOCK + 1)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize("windows", ["starts", "anywhere", "packed"])
def test_the_batch_size_only_cuts_the_sequence_of_rows(windows: str, store: TokenStore) -> None:
    whole = _rows(_take(_feed(store, windows=windows), 12))
    _assert_equal(_rows(_take(_feed(store, windows=windows, batch_size=3), 16)), whole)
    _assert_equal(_rows(_take(_feed(store, windows=windows, batch_size=2, micro_batches=4), 6)), whole)


def test_the_order_depends_on_the_seed_alone(store: TokenStore) -> None:
    once, again = _take(_feed(store), 4), _take(_feed(store), 4)
    _assert_equal(once, again)
    assert not np.array_equal(once.tokens, _take(_feed(store, seed=4), 4).tokens)


def test_the_order_is_that_of_the_first_version(tmp_path: Path) -> None:
    # Checkpoints of runs made before states had fingerprints go on with these very rows.
    store = _store(tmp_path, [BLOCK + 1] * 10)
    feed = _feed(store, batch_size=10, seed=7)
    starts = {tuple(store.record(i).tolist()): i for i in range(10)}
    order = [starts[tuple(row)] for row in _rows(_take(feed, 2)).tokens.tolist()]
    assert order == [7, 9, 0, 8, 4, 2, 5, 6, 3, 1, 6, 0, 4, 2, 7, 9, 1, 5, 8, 3]


def test_the_order_is_that_of_grains_own_shuffle(larger: TokenStore) -> None:
    windows = _all(_open(larger)).tokens
    order = grain.MapDataset.range(len(windows)).seed(3).shuffle().repeat()
    taken = _rows(_take(_feed(larger, batch_size=50), 20)).tokens
    np.testing.assert_array_equal(taken, windows[[order[i] for i in range(1000)]])


def test_micro_batches_are_consecutive_batches(store: TokenStore) -> None:
    plain = _take(_feed(store), 6)
    grouped = _take(_feed(store, micro_batches=3), 2)
    assert grouped.tokens.shape == (2, 3, 4, BLOCK + 1)
    np.testing.assert_array_equal(grouped.tokens.reshape(plain.tokens.shape), plain.tokens)


CUTS = [
    {"windows": "starts"},
    {"windows": "anywhere"},
    {"windows": "packed"},
    {"windows": "starts", "underrep_p": 0.4},
    {"windows": "packed", "underrep_p": 0.4},
]


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_hosts_share_the_rows_that_one_host_would_read(
    cut: dict[str, Any], hosts: int, larger: TokenStore
) -> None:
    store = larger
    alone = _take(_feed(store, micro_batches=2, **cut), 4)
    shares = [_take(_feed(store, micro_batches=2, host=host, hosts=hosts, **cut), 4) for host in range(hosts)]
    assert shares[0].tokens.shape[2] == 4 // hosts
    _assert_equal(_joined(shares, axis=2), alone)


def test_hosts_read_disjoint_parts(store: TokenStore) -> None:
    shares = [
        _rows(_take(_feed(store, batch_size=20, host=host, hosts=4), 1)).tokens.tolist() for host in range(4)
    ]
    seen = [tuple(row) for share in shares for row in share]
    assert len(set(seen)) == len(seen) == RECORDS - 1


def test_a_batch_that_does_not_divide_over_the_hosts_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="batch of 4 rows does not divide over 3 hosts"):
        _feed(store, hosts=3)


def _rare_steps(taken: Batch, store: TokenStore) -> np.ndarray:
    """Of which steps all rows begin with an under-represented record; by chance that is rare."""
    marked = {tuple(store.tokens[start : start + 6].tolist()) for start in store.underrepresented}
    return np.array([all(tuple(row[:6].tolist()) in marked for row in step[0]) for step in taken.tokens])


@pytest.mark.parametrize("windows", ["starts", "anywhere", "packed"])
def test_whole_micro_batches_are_under_represented_with_their_probability(
    windows: str, larger: TokenStore
) -> None:
    rare = _rare_steps(_take(_feed(larger, windows=windows, underrep_p=0.25), 1000), larger)
    assert 250 <= rare.sum() <= 253
    assert 30 < rare[:200].sum() < 70


def test_the_mixture_passes_no_row_over(larger: TokenStore) -> None:
    taken = _take(_feed(larger, underrep_p=0.5, batch_size=1), 100)
    plain = _rows(_take(_feed(larger, batch_size=1), 30)).tokens.tolist()
    found = iter(_rows(taken).tokens.tolist())
    assert all(row in found for row in plain)  # the same sequence, others in between


def test_a_mixture_of_one_kind_alone(store: TokenStore) -> None:
    taken = _take(_feed(store, underrep_p=1.0), 3)
    assert _rare_steps(taken, store).all()
    # Three records in batches of four: they repeat, one epoch after another.
    rows = [tuple(row) for row in _rows(taken).tokens.tolist()]
    assert all(len(set(rows[i : i + 3])) == 3 for i in range(0, 12, 3))
    _assert_equal(_take(_feed(store, underrep_p=1e-9), 30), _take(_feed(store), 30))


def test_under_represented_records_that_are_not_there_are_refused(tmp_path: Path) -> None:
    bare = _store(tmp_path / "bare", [BLOCK + 1, BLOCK + 1])
    with pytest.raises(DataError, match="marks no under-represented records in 'train'"):
        _feed(bare, underrep_p=0.1)
    short = _store(tmp_path / "short", [BLOCK + 1, 3], (1,))
    with pytest.raises(DataError, match="window of 16 from an under-represented record on"):
        _feed(short, underrep_p=0.1)
    assert np.unique(_take(_feed(short, underrep_p=1.0, windows="packed"), 1).tokens, axis=2).shape[2] == 1


@pytest.mark.parametrize("taken", [0, 3, 97])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_state_continues_exactly_there(cut: dict[str, Any], taken: int, larger: TokenStore) -> None:
    store = larger
    straight = _take(_feed(store, **cut), taken + 8)
    first = _feed(store, **cut)
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    resumed = _feed(store, **cut)
    resumed.set_state(state)
    expected = Batch(*(None if leaf is None else leaf[taken:] for leaf in straight))
    _assert_equal(_take(resumed, 8), expected)
    # And on two hosts.
    shares = [_feed(store, host=host, hosts=2, **cut) for host in range(2)]
    for share in shares:
        share.set_state(state)
    _assert_equal(_joined([_take(share, 8) for share in shares], axis=2), expected)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"windows": "packed"}, ("windows=starts", "windows=packed", "set windows back")),
        ({"seed": 4}, ("seed=3", "seed=4")),
        ({"block_size": 14}, ("block_size=15", "block_size=14")),
        ({"batch_size": 2}, ("batch_size=4", "batch_size=2")),
        ({"micro_batches": 2}, ("gradient_accumulation_steps=1", "gradient_accumulation_steps=2")),
        ({"underrep_p": 0.5}, ("underrep_p=0.0", "underrep_p=0.5", "init_from=RUN_FOLDER")),
    ],
    ids=str,
)
def test_a_state_of_other_settings_is_refused(
    change: dict[str, Any], parts: tuple[str, ...], store: TokenStore
) -> None:
    _refused(_state(_feed(store)), _feed(store, **change), *parts)


@pytest.mark.parametrize(
    "cut",
    [
        {"windows": "starts"},
        {"windows": "anywhere"},
        {"windows": "packed"},
        {"windows": "starts", "underrep_p": 0.5},
    ],
    ids=["starts", "anywhere", "packed", "mixed"],
)
def test_a_step_says_which_records_it_reads(cut: dict[str, Any], store: TokenStore) -> None:
    whole = _feed(store, micro_batches=2, **cut)
    steps = [next(whole) for _ in range(7)]
    # Whichever host is asked, and wherever it stands.
    host = _feed(store, micro_batches=2, host=1, hosts=2, **cut)
    ids = host.record_ids(7)
    assert [len(rows) for rows in ids] == [4, 4]
    rows, named = steps[6].tokens.reshape(8, -1).tolist(), itertools.chain.from_iterable(ids)
    for row, names in zip(rows, named, strict=True):
        records = [store.record(int(name)).tolist() for name in names]
        *starts, end = itertools.accumulate(map(len, records), initial=0)
        tokens = list(itertools.chain.from_iterable(records))
        if cut["windows"] == "packed":
            assert row[: len(tokens)] == tokens
        else:
            begins = [begin for begin in range(len(records[0])) if tokens[begin:][: len(row)] == row]
            assert len(begins) == 1
            # None too many: the last of them has the row's last token.
            assert begins[0] + len(row) > starts[-1]
            assert end >= begins[0] + len(row)
    whole.close()
    host.close()


def _state(feed: Feed) -> dict[str, Any]:
    feed.close()
    return feed.get_state()


def _refused(state: dict[str, Any], feed: Feed, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        feed.set_state(state)
    feed.close()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_state_of_other_data_is_refused(store: TokenStore, tmp_path: Path) -> None:
    other = _store(tmp_path / "other", [9] * 30, (1,))
    checksum = store.header.splits["train"].sha256
    _refused(
        _state(_feed(store)), _feed(other), f"dataset={checksum[:12]}…", "the folder that it was trained on"
    )
    state = _state(_feed(store))
    state["fingerprint"]["order"] = "0" * 16  # as another library's shuffle would give
    _refused(state, _feed(store), "order=0000", "numpy and grain")
    # The same tokens with other marks are other data too, where marks are read.
    marked_otherwise = _store(
        tmp_path / "marks", [7 + i % 5 for i in range(RECORDS - 1)] + [BLOCK], (0, 5, 11)
    )
    _refused(_state(_feed(store, underrep_p=0.5)), _feed(marked_otherwise, underrep_p=0.5), "order=")
    same = _feed(marked_otherwise)
    same.set_state(_state(_feed(store)))
    same.close()


def test_a_state_of_an_earlier_version_goes_on(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    straight = _take(_feed(store), 9)
    feed = _feed(store)
    with caplog.at_level(logging.WARNING):
        feed.set_state({"next_index": 5})
    assert len(caplog.messages) == 1
    assert "does not say what its data was" in caplog.text
    np.testing.assert_array_equal(_take(feed, 4).tokens, straight.tokens[5:])
    _refused({"next_index": 5}, _feed(store, windows="packed"), "windows=starts", "windows=packed")
    _refused({"next_index": 5}, _feed(store, underrep_p=0.5), "underrep_p=0.0")


def test_published_files_are_known_by_their_size(store: TokenStore, tmp_path: Path) -> None:
    np.asarray(store.tokens).tofile(tmp_path / "train.bin")
    feed = _feed(TokenStore.open(tmp_path))
    assert _state(feed)["fingerprint"]["dataset"] == f"{len(store.tokens)} tokens"


@pytest.mark.parametrize("windows", ["starts", "packed"])
def test_evaluation_reads_the_same_batches_every_time(windows: str, store: TokenStore) -> None:
    once, again, other = (
        _joined(list(evaluation_batches(_open(store, windows), batch_size=2, count=3, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert once.tokens.shape == (3, 2, BLOCK + 1)
    assert (once.loss_mask is None) == (windows == "starts")
    _assert_equal(once, again)
    assert not np.array_equal(once.tokens, other.tokens)
    assert len(np.unique(_rows(once).tokens, axis=0)) == 6


def test_evaluation_takes_every_window_where_there_are_fewer_than_asked_for(store: TokenStore) -> None:
    batches = list(evaluation_batches(_open(store), batch_size=6, count=100, seed=1))
    assert [len(batch.tokens) for batch in batches] == [6, 6, 6, 6]
    rows = np.concatenate([batch.tokens for batch in batches])
    assert len(np.unique(rows[: RECORDS - 1], axis=0)) == RECORDS - 1
    np.testing.assert_array_equal(rows[RECORDS - 1 :], rows[:4])
    # What fills the last batch is not counted again.
    masks = np.concatenate([batch.loss_mask for batch in batches])
    assert masks[: RECORDS - 1].all()
    assert not masks[RECORDS - 1 :].any()
    assert [batch.counted for batch in batches] == [6 * BLOCK] * 3 + [2 * BLOCK]


def test_evaluation_counts_every_packed_target_once(store: TokenStore) -> None:
    rows = _open(store, "packed", 40)
    expected = int(np.count_nonzero(_all(rows).loss_mask))
    assert expected == len(store.tokens) - len(store)
    for batch_size in (2, 3, 7):
        batches = list(evaluation_batches(rows, batch_size=batch_size, count=100, seed=1))
        assert sum(batch.counted for batch in batches) == expected
        assert {batch.tokens.shape for batch in batches} == {(batch_size, 41)}
