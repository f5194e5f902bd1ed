"""Continuous batching: a batch of rows on one device, where a row that ends makes room for the next at once.

The host fills places and takes finished rows out between two calls of `decode_steps`, each as many steps as a page has
positions. In between it sees nothing but the rows' lengths and how they stand.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Weights
from crystallm_jax.model.pages import empty_log, log_pages
from crystallm_jax.sampling.constrain import AutomatonState, RowPlan, idle_state, stacked
from crystallm_jax.sampling.decode import Rules, decoder
from crystallm_jax.sampling.device_rows import (
    NewRows,
    begin_rows,
    empty_rows,
    fork_rows,
    look_at,
    look_at_crystals,
    replan_rows,
    return_to_sites,
    take_rows_back,
)
from crystallm_jax.sampling.devices import Placement
from crystallm_jax.sampling.page_pool import Pool
from crystallm_jax.sampling.reader import Read, Reader, by_reading
from crystallm_jax.sampling.returns import CELL, History, go_back_each
from crystallm_jax.sampling.shapes import padded, padded_rows

_log_pages = jax.jit(log_pages)


class Row(NamedTuple):
    """A row to generate.

    Attributes:
        name: of whoever asked for it.
        prompt: int [T]; its tokens.
        key: uint32; the data of its key.
        limit: tokens that it may have in all.
        returns: how often it is taken to have been taken back already.
    """

    name: tuple[int, int]
    prompt: np.ndarray
    key: np.ndarray
    limit: int
    returns: int = 0


class Ended(NamedTuple):
    """A row that ended.

    Attributes:
        row: what was asked for.
        tokens: int32 [T]; prompt and generated tokens.
        log_prob: in nats.
        finished: whether it came to its end.
        seconds: since it began.
        history: what failed in its crystal.
        unplaced: whether it was given up, as its atoms found no place.
    """

    row: Row
    tokens: np.ndarray
    log_prob: float
    finished: bool
    seconds: float
    history: History
    unplaced: bool


class _Planned(NamedTuple):
    """Registers of a row under constraint, the tokens that its text had there, and those forced behind them."""

    state: AutomatonState
    length: int
    forced: int = 0


@dataclass(frozen=True)
class EngineShape:
    """What an engine is compiled for.

    Attributes:
        config: the model's shape.
        rules: how rows go on.
        rows: B.
        page: S, positions of a page and steps between two looks of the host.
        dtype: of keys and values.
        longest: tokens of the longest text to come.
    """

    config: ModelConfig
    rules: Rules
    rows: int
    page: int
    dtype: str
    longest: int


class Engine:
    """Owns a batch on the device.

    Args:
        shape: what it is compiled for.
        weights: as prepared.
        placement: where it runs.
    """

    def __init__(self, shape: EngineShape, weights: Weights, placement: Placement) -> None:
        self.placement = placement
        # Here, not at the first step: engines begin together, each in a thread of its own.
        self._decode = decoder(placement.platform)
        self._shape, self._weights = shape, placement.weights(weights)
        config, rows, automaton = shape.config, shape.rows, shape.rules.automaton
        registers = None if automaton is None else idle_state(automaton, rows)
        state = empty_rows(rows, config.block_size + 1, config.vocab_size, automaton=registers)
        self._state = jax.device_put(state, placement.whole)
        self._log = placement.made_by_heads(empty_log, config, rows, shape.page, shape.dtype)
        self._pool = Pool(
            config, rows, size=shape.page, dtype=shape.dtype, placement=placement, longest=shape.longest
        )
        self._rows: list[Row | None] = [None] * rows
        self._begun = [0.0] * rows
        self._planned: list[_Planned | None] = [None] * rows
        # Tokens of each row, and how many of them were read.
        self._length, self._read = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._histories = [History()] * rows
        self._reader = Reader(config, self._weights, page=shape.page, dtype=shape.dtype)

    @property
    def free(self) -> int:
        """Places without a row."""
        return self._rows.count(None)

    @property
    def taken(self) -> int:
        """Places with a row."""
        return len(self._rows) - self.free

    def admit(self, rows: Sequence[Row]) -> None:
        """Begin rows, at most as many as there are free places."""
        if not rows:
            return
        plans = [self._plan(row.prompt, row.limit) for row in rows]
        texts = [
            row.prompt if plan is None else np.concatenate([row.prompt, plan.forced])
            for row, plan in zip(rows, plans, strict=True)
        ]
        reads = self._reader.read(texts)
        places = [place for place, row in enumerate(self._rows) if row is None][: len(rows)]
        for place, row, plan, text in zip(places, rows, plans, texts, strict=True):
            self._rows[place], self._begun[place] = row, time.perf_counter()
            self._histories[place] = History()
            self._length[place], self._read[place] = len(text), len(text) - 1
            self._planned[place] = None if plan is None else _Planned(plan.state, len(text))
        self._give_pages(places, reads)
        for members in by_reading(reads):
            self._begin(
                [places[i] for i in members], [texts[i] for i in members], [reads[i] for i in members]
            )

    def start(self) -> None:
        """Go on by a page of steps, without waiting for them."""
        shape = self._shape
        self._state, self._log = self._decode(
            shape.config,
            shape.rules,
            weights=self._weights,
            blocks=self._pool.blocks,
            table=self._pool.table(),
            state=self._state,
            log=self._log,
        )

    def finish(self) -> list[Ended]:
        """Wait for the steps; the rows that ended, whose places are free again."""
        failed, begins = self._look_at_crystals()
        state = self._state
        waits = state.finished if state.automaton is None else state.automaton.waiting
        length, unread, finished, waiting, failed, begins = jax.device_get(
            (state.length, state.unread, state.finished, waits, failed, begins)
        )
        taken = np.array([row is not None for row in self._rows])
        limit = np.array([0 if row is None else row.limit for row in self._rows])
        wrong = np.flatnonzero(taken & (failed >= 0)).tolist()
        back, unplaced = go_back_each(self._histories, {place: int(failed[place]) for place in wrong})
        ended = taken & (finished | (length >= limit))
        ended[list(back)] = False
        ended[unplaced] = True
        read = length - unread
        self._keep_log(np.flatnonzero(taken & ~ended & (read > self._read)), read - self._read)
        self._length, self._read = np.where(taken, length, 0), np.where(taken, read, 0)
        results = self._take_out(np.flatnonzero(ended), unplaced)
        self._replan(np.flatnonzero(waiting & taken & ~ended))
        self._draw_anew(back, begins)
        return results

    def take_back(self, lengths: dict[tuple[int, int], int]) -> None:
        """Take rows back, by their names, to earlier lengths of their texts, from which they draw anew.

        Nothing is read again but the newest token that is left. What is drawn is a function of the row's key, the
        position and how often the row was taken back.

        Raises:
            ValueError: no row has the name, or the length is less than its prompt's or more than its text's.
        """
        if not lengths:
            return
        places, to = [self._place(name) for name in lengths], list(lengths.values())
        for place, length in zip(places, to, strict=True):
            least, most = len(self._row(place).prompt), self._length[place]
            if not least <= length <= most:
                raise ValueError(
                    f"row {self._row(place).name}: cannot go back to {length}: {least} to {most} tokens"
                )
        planned = [self._planned_before(place, length) for place, length in zip(places, to, strict=True)]
        for place, length, since in zip(places, to, planned, strict=True):
            self._pool.cut(place, length - 1)
            self._length[place], self._read[place], self._planned[place] = length, length - 1, since
        size = padded_rows(len(places))
        self._state = take_rows_back(
            self._shape.rules.automaton,
            self._state,
            self._padded_places(places, size),
            to=padded(to, size, fill=0),
            planned=stacked([of and of.state for of in planned], size),
            since=padded([of.length if of else 0 for of in planned], size, fill=0),
        )

    def fork(self, name: tuple[int, int], rows: Sequence[Row]) -> None:
        """Let further rows, at most as many as there are free places, go on from the text that a row has now.

        Of each only name, key and limit are asked for; nothing is read again.

        Raises:
            ValueError: no row has the name.
        """
        source = self._place(name)
        places = [place for place, row in enumerate(self._rows) if row is None][: len(rows)]
        for place, row in zip(places, rows, strict=True):
            self._rows[place] = row._replace(prompt=self._row(source).prompt)
            self._begun[place], self._planned[place] = self._begun[source], self._planned[source]
            self._histories[place] = self._histories[source]
            self._length[place], self._read[place] = self._length[source], self._read[source]
        self._pool.copy(source, places)
        size = padded_rows(len(places))
        self._state = fork_rows(
            self._state,
            self._padded_places(places, size),
            source=np.full(size, source, np.int32),
            key=padded(np.stack([row.key for row in rows]), size, fill=0),
            limit=padded([row.limit for row in rows], size, fill=0),
        )

    def _look_at_crystals(self) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
        """The part of each row's crystal that cannot stay, -1 for none, and where its sites begin, [B, sites]."""
        automaton = self._shape.rules.automaton
        if automaton is None or not automaton.holds("positions"):
            return np.full(len(self._rows), -1), np.zeros((len(self._rows), 0), np.int32)
        self._state, failed, begins = look_at_crystals(self._state)
        return failed, begins

    def _draw_anew(self, back: Mapping[int, int], begins: np.ndarray) -> None:
        """Let rows go back to the beginning of a part of their crystals."""
        cells = {place: self._planned[place] for place, part in back.items() if part == CELL}
        self.take_back(
            {self._row(place).name: since.length + since.forced for place, since in cells.items() if since}
        )
        sites = {place: part - 1 for place, part in back.items() if part != CELL}
        if not sites:
            return
        for place, site in sites.items():
            length = int(begins[place, site])
            self._pool.cut(place, length - 1)
            self._length[place], self._read[place] = length, length - 1
        size = padded_rows(len(sites))
        self._state = return_to_sites(
            self._state, self._padded_places(list(sites), size), padded(list(sites.values()), size, fill=0)
        )

    def _plan(self, text: np.ndarray, limit: int) -> RowPlan | None:
        automaton = self._shape.rules.automaton
        return None if automaton is None else automaton.plan(text, limit=limit)

    def _row(self, place: int) -> Row:
        row = self._rows[place]
        if row is None:
            raise RuntimeError(f"place {place} has no row")
        return row

    def _place(self, name: tuple[int, int]) -> int:
        for place, row in enumerate(self._rows):
            if row is not None and row.name == name:
                return place
        raise ValueError(f"no row is named {name}")

    def _padded_places(self, places: Sequence[int], size: int) -> np.ndarray:
        return padded(places, size, fill=len(self._rows))

    def _give_pages(self, places: Sequence[int], reads: Sequence[Read]) -> None:
        """Give rows the pages that were read for them."""
        targets = [self._pool.assign(place, read.fills) for place, read in zip(places, reads, strict=True)]
        for members in by_reading(reads):
            self._pool.put(
                reads[members[0]].reading.pages,
                [page for i in members for page in reads[i].pages],
                [page for i in members for page in targets[i]],
            )

    def _begin(self, places: Sequence[int], texts: Sequence[np.ndarray], reads: Sequence[Read]) -> None:
        """Begin rows whose texts were read together."""
        size = padded_rows(len(places))
        rows = [self._row(place) for place in places]
        tokens = np.zeros((size, self._shape.config.block_size + 1), np.int32)
        for into, text in zip(tokens, texts, strict=False):
            into[: len(text)] = text
        planned = [self._planned[place] for place in places]
        self._state = begin_rows(
            self._state,
            self._padded_places(places, size),
            new=NewRows(
                tokens,
                padded([len(text) for text in texts], size, fill=0),
                padded([len(row.prompt) for row in rows], size, fill=0),
                padded([row.limit for row in rows], size, fill=0),
                padded([row.returns for row in rows], size, fill=0),
                padded(np.stack([row.key for row in rows]), size, fill=0),
                stacked([of and of.state for of in planned], size),
            ),
            log_probs=reads[0].reading.log_probs,
            source=padded([read.number for read in reads], size, fill=0),
        )

    def _keep_log(self, places: np.ndarray, written: np.ndarray) -> None:
        """Give rows what they wrote into the log."""
        if len(places):
            targets = [self._pool.assign(int(place), [int(written[place])])[0] for place in places]
            self._pool.put(_log_pages(self._log), places.tolist(), targets)

    def _take_out(self, places: np.ndarray, unplaced: Collection[int]) -> list[Ended]:
        if not len(places):
            return []
        seen = look_at(self._state, padded(places, padded_rows(len(places)), fill=0))
        results = []
        for i, place in enumerate(places.tolist()):
            row, length = self._row(place), seen.length[i]
            log_prob = float(seen.log_probs[i, len(row.prompt) : length].sum())
            seconds = time.perf_counter() - self._begun[place]
            given_up = place in unplaced
            finished = bool(seen.finished[i]) and not given_up
            history = self._histories[place]
            results.append(
                Ended(row, seen.tokens[i, :length], log_prob, finished, seconds, history, given_up)
            )
            self._rows[place], self._planned[place] = None, None
            self._length[place] = self._read[place] = 0
            self._pool.release(place)
        return results

    def _replan(self, places: np.ndarray) -> None:
        """Plan how rows go on that wait for it, from what they have drawn."""
        if not len(places):
            return
        size = padded_rows(len(places))
        seen = look_at(self._state, padded(places, size, fill=0))
        states: list[AutomatonState | None] = []
        for i, place in enumerate(places.tolist()):
            text = seen.tokens[i, : seen.length[i]]
            plan = self._plan(text, self._row(place).limit)
            if plan is not None:
                self._planned[place] = _Planned(plan.start, len(text), len(plan.forced))
                states.append(plan.start)
        self._state = replan_rows(
            self._state, self._padded_places(places.tolist(), size), stacked(states, size)
        )

    def _planned_before(self, place: int, length: int) -> _Planned | None:
        """The registers that those after so many tokens follow from."""
        planned = self._planned[place]
        if planned is not None and planned.length > length:
            row = self._row(place)
            plan = self._plan(row.prompt, row.limit)
            if plan is not None:
                return _Planned(plan.start, len(row.prompt))
        return planned
