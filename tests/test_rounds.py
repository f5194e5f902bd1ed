"""Engines side by side: who gets what, when it is handed on, and when there is no more to come."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from crystallm_jax.sampling.requests import EverySample, Wanted
from crystallm_jax.sampling.rounds import all_rounds


class _Engine:
    """Ends a row a round."""

    def __init__(self, places: int) -> None:
        self.places, self.rows, self.admitted = places, list[Any](), list[Any]()

    @property
    def free(self) -> int:
        return self.places - len(self.rows)

    @property
    def taken(self) -> int:
        return len(self.rows)

    def admit(self, rows: list[Any]) -> None:
        assert len(rows) <= self.free
        self.rows += rows
        self.admitted += rows

    def start(self) -> None:
        assert self.rows

    def finish(self) -> list[Any]:
        return [self.rows.pop(0)]


class _Dependent:
    """Asks for one sample after another, each when the one before was handed on."""

    def __init__(self, count: int) -> None:
        self.left, self.ready, self.waited = count, 1, 0

    def take(self, most: int) -> Sequence[Wanted]:
        given = min(most, self.ready)
        self.ready -= given
        return [Wanted(0, i) for i in range(given)]

    def wait(self) -> bool:
        self.waited += 1
        return False

    def handed_on(self) -> None:
        self.left -= 1
        self.ready += self.left > 0


def _rounds(engines: list[_Engine], orders: Any, first: Sequence[Wanted]) -> Iterator[list[Any]]:
    return all_rounds(engines, orders, first=first, rows_of=lambda _, wanted: list(wanted))  # type: ignore[arg-type]


def test_all_is_made_once_and_every_engine_has_a_part_of_the_first() -> None:
    engines, orders = [_Engine(2), _Engine(2), _Engine(2)], EverySample([4, 6])
    made = [one for ended in _rounds(engines, orders, orders.take(5)) for one in ended]
    assert sorted(made) == [Wanted(prompt, i) for prompt, count in ((0, 4), (1, 6)) for i in range(count)]
    assert [engine.admitted[:1] for engine in engines] == [[Wanted(0, 0)], [Wanted(0, 1)], [Wanted(0, 3)]]


def test_what_ended_is_handed_on_before_anything_is_waited_for() -> None:
    orders, made = _Dependent(5), 0
    for ended in _rounds([_Engine(2), _Engine(2)], orders, []):
        for _ in ended:
            made += 1
            orders.handed_on()
    assert made == 5
    assert orders.waited == 1


def test_an_engine_that_fails_ends_it() -> None:
    class Failing(_Engine):
        def start(self) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(_rounds([Failing(1), _Engine(1)], EverySample([4]), []))
