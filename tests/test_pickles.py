"""Pickles: plain lists are read, a few elements at a time; nothing in one is ever run or believed."""

import contextlib
import io
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.data.reading import pickles
from crystallm_jax.data.reading.offsets import read_offsets
from crystallm_jax.data.reading.pickles import iterate_list, read_value
from crystallm_jax.errors import DataError

PAIRS = [(f"mp-{i}", f"data_{i}\n_cell_length_a {i * 1.5}\n") for i in range(3)]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def _elements(data: bytes) -> list[Any]:
    return list(iterate_list(lambda: io.BytesIO(data), "x.pkl"))


class _Calls:
    """Pickles to a call of `os.system`."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return os.system, ("exit 1",)


HOSTILE = {
    "global": b"\x80\x02]cos\nsystem\n(X\x02\x00\x00\x00lstRa.",
    "stack global": b"\x80\x04]\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85Ra.",
    "inst": b"](X\x02\x00\x00\x00lsios\nsystem\na.",
    "obj": b"\x80\x02](cos\nsystem\nX\x02\x00\x00\x00lsoa.",
    "build": b"\x80\x02]}}ba.",
    "newobj": b"\x80\x02]N)\x81a.",
    "newobj_ex": b"\x80\x04]N)}\x92a.",
    "ext1": b"\x80\x02]\x82\x01a.",
    "ext2": b"\x80\x02]\x83\x01\x00a.",
    "ext4": b"\x80\x02]\x84\x01\x00\x00\x00a.",
    "persid": b"]Pabc\na.",
    "binpersid": b"\x80\x02]K\x01Qa.",
    "next_buffer": b"\x80\x05]\x97a.",
    "bytearray": b"\x80\x05]\x96\x01\x00\x00\x00\x00\x00\x00\x00aa.",
    "set": b"\x80\x04]\x8fa.",
    "reduce": b"\x80\x02]K\x01)Ra.",
}
BROKEN = {
    "empty": b"",
    "no list": b"\x80\x04K\x01.",
    "tuple": pickle.dumps(tuple(PAIRS)),
    "dictionary": pickle.dumps({"a": 1}),
    "two values": b"]].",
    "no second value": b"\x80\x02]K\x01\x86.",
    "underflow": b"\x80\x02]\x86a.",
    "append to nothing": b"a.",
    "append to a text": b"\x80\x02]X\x01\x00\x00\x00aK\x01a.",
    "no mark": b"\x80\x02]K\x01e.",
    "mark left": b"](.",
    "mark between": b"\x80\x02]K\x01(\x86a.",
    "no memo": b"\x80\x02]h\x07a.",
    "memo of nothing": b"\x80\x02](q\x01h\x01e.",
    "two numberings": b"\x80\x04]q\x00\x94h\x00a.",
    "holds itself": b"\x80\x04]\x94h\x00a.",
    "list as a key": b"\x80\x02]}]K\x01sa.",
    "odd dictionary": b"\x80\x02]}(K\x01ua.",
    "follows": pickle.dumps(PAIRS) + pickle.dumps(PAIRS),
    "unknown opcode": b"]\xffa.",
    "bad utf-8": b"\x80\x02]X\x01\x00\x00\x00\xffa.",
    "endless number": b"]L" + b"9" * 10_000 + b"L\na.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line(name: str) -> None:
    for read in (_elements, lambda data: read_value(io.BytesIO(data), "x.pkl")):
        with pytest.raises(DataError, match=r"x\.pkl: refused as a pickle \(it wants ") as caught:
            read(HOSTILE[name])
        assert "\n" not in str(caught.value)


def test_the_name_that_is_wanted_is_told() -> None:
    for protocol in PROTOCOLS:
        with pytest.raises(DataError, match="system"):
            _elements(pickle.dumps([("a", "b"), _Calls()], protocol))
    with pytest.raises(DataError, match=r"'os\.system' \(STACK_GLOBAL\)"):
        _elements(HOSTILE["stack global"])
    with pytest.raises(DataError, match=r"'os\.system' \(GLOBAL\)"):
        _elements(HOSTILE["global"])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(DataError, match=r"x\.pkl: refused") as caught:
        _elements(BROKEN[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_cut_at_any_byte_is_refused(protocol: int) -> None:
    data = pickle.dumps(PAIRS, protocol)
    assert _elements(data) == PAIRS
    for end in range(len(data)):
        with pytest.raises(DataError):
            _elements(data[:end])
    numbers = pickle.dumps([1, 2, 300, 70_000, 80_000, 2**40] * 5, protocol)
    for end in range(len(numbers)):
        with pytest.raises(DataError):
            read_offsets(io.BytesIO(numbers[:end]), "starts.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]\x8d" + struct.pack("<Q", 2**60) + b"abc",
        b"\x80\x04]\x8d" + struct.pack("<Q", 2**63) + b"abc",
        b"\x80\x02]X" + struct.pack("<I", 2**32 - 1) + b"abc",
        b"\x80\x04]\x8e" + struct.pack("<Q", 2**40) + b"abc",
        b"\x80\x02]\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",
        b"\x80\x02]\x8b" + struct.pack("<i", -5) + b"abc",
    ],
)
def test_a_lie_about_a_length_takes_no_memory(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(DataError, match="refused as a pickle"):
        _elements(data + bytes(1000))
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_values_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_WAITING", 100_000)
    assert len(_elements(pickle.dumps([("a", "b" * 20) for _ in range(10_000)][:200] * 1))) == 200
    with pytest.raises(DataError, match="takes over"):
        _elements(b"\x80\x04](" + b"K\x01" * 10_000 + b"e.")
    with pytest.raises(DataError, match="takes over"):
        _elements(b"\x80\x04]" + b"(" * 10_000 + b".")
    monkeypatch.setattr(pickles, "MOST_SHARED", 10)
    with pytest.raises(DataError, match="more than once"):
        _elements(pickle.dumps([text for text in map(str, range(20)) for _ in range(2)]))


def test_deep_nesting_does_no_harm() -> None:
    deep = b"\x80\x02]" + b"]" + b"\x85" * 50_000 + b"a."
    assert len(_elements(deep)) == 1
    with pytest.raises(DataError, match="key"):
        _elements(b"\x80\x02]}" + b"]" + b"\x85" * 50_000 + b"Nsa.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_long_list_is_handed_on_in_little_memory(protocol: int) -> None:
    data = pickle.dumps([(f"id-{i}", f"data_{i}\n" * 20) for i in range(8_000)], protocol)
    tracemalloc.start()
    count = sum(1 for _ in iterate_list(lambda: io.BytesIO(data), "x.pkl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8_000
    assert peak < 1.2 * 2**20 < len(data)


TEXTS = st.text(max_size=40)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS, st.binary(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(TEXTS, inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), max_size=30), protocol=st.sampled_from(PROTOCOLS))
def test_pairs_come_back(pairs: list[tuple[str, str]], protocol: int) -> None:
    again = [*pairs, *pairs[:3]]
    assert _elements(pickle.dumps(again, protocol)) == again


@settings(max_examples=150, deadline=None)
@given(values=st.lists(VALUES, max_size=6), protocol=st.integers(3, 5))
def test_plain_values_come_back(values: list[Any], protocol: int) -> None:
    shared = [*values, values[0], [values[-1]]] if values else values
    data = pickle.dumps(shared, protocol)
    assert _elements(data) == shared
    assert read_value(io.BytesIO(data), "x.pkl") == shared


@settings(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=60), place=st.integers(0, 60))
def test_nothing_but_a_data_error_comes_out_of_damage(junk: bytes, place: int) -> None:
    whole = pickle.dumps(PAIRS, 4)
    for data in (junk, whole[:place] + junk + whole[place + len(junk) :]):
        for read in (
            _elements,
            lambda data: read_value(io.BytesIO(data), "x"),
            lambda data: read_offsets(io.BytesIO(data), "x"),
        ):
            with contextlib.suppress(DataError):
                read(data)


def test_a_value_larger_than_its_limit_is_refused() -> None:
    assert read_value(io.BytesIO(pickle.dumps({"a": (1, None)})), "meta.pkl") == {"a": (1, None)}
    with pytest.raises(DataError, match="larger than 100 bytes"):
        read_value(io.BytesIO(pickle.dumps("x" * 200)), "meta.pkl", limit=100)


@settings(max_examples=100, deadline=None)
@given(
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 70_000), max_size=60),
    repeat=st.integers(1, 40),
    protocol=st.integers(2, 5),
)
def test_offsets_come_back(numbers: list[int], repeat: int, protocol: int) -> None:
    found = read_offsets(io.BytesIO(pickle.dumps(numbers * repeat, protocol)), "starts.pkl")
    assert found.dtype == np.int64
    assert found.tolist() == numbers * repeat


@pytest.mark.parametrize(
    "value", [(1, 2), [1, "two"], [1, [2]], [1.5], [2**80], {1: 2}, 7, np.int64(3), [np.int64(3)], [None]]
)
def test_offsets_are_whole_numbers_in_a_list(value: object) -> None:
    with pytest.raises(DataError, match="whole number"):
        read_offsets(io.BytesIO(pickle.dumps(value)), "starts.pkl")
    with pytest.raises(DataError, match="refused as a pickle"):
        read_offsets(io.BytesIO(pickle.dumps([1]) + b"."), "starts.pkl")
