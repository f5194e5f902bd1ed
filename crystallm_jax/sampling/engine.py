"""Continuous batching: a batch of rows on one device, where a row that ends makes room for the next at once.

The host fills places and takes finished rows out between two calls of `decode_steps`, each as many steps as a page has
positions. In between it sees nothing but the rows' lengths and how they stand.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Weights
from crystallm_jax.model.pages import empty_log, log_pages
from crystallm_jax.sampling.constrain import AutomatonState, idle_state
from crystallm_jax.sampling.decode import NO_TOKEN, Rules, decoder
from crystallm_jax.sampling.devices import Placement
from crystallm_jax.sampling.places import (
    Forced,
    NewRows,
    empty_rows,
    fill_places,
    go_on,
    look_ahead,
    look_at,
    padded,
    padded_count,
    padded_rows,
)
from crystallm_jax.sampling.pool import Pool
from crystallm_jax.sampling.reader import Piece, Read, read_pieces

# Forced tokens that are read at once at most; a longer run is read in several pieces.
_RUN = 64
# Texts whose reading is kept for further samples of them.
_TEXTS = 16

_log_pages = jax.jit(log_pages)


class Row(NamedTuple):
    """A row to generate.

    Attributes:
        name: of whoever asked for it.
        prompt: int [T]; its tokens.
        key: uint32; the data of its key.
        limit: tokens that it may have in all.
    """

    name: tuple[int, int]
    prompt: np.ndarray
    key: np.ndarray
    limit: int


class Ended(NamedTuple):
    """A row that ended: its tokens, log-probability in nats, whether it came to its end, seconds since it began."""

    row: Row
    tokens: np.ndarray
    log_prob: float
    finished: bool
    seconds: float


class Plan(NamedTuple):
    """How a row goes on: the tokens that must follow now, int32, and where it stands behind them."""

    forced: np.ndarray
    state: AutomatonState | None


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
        config, rows = shape.config, shape.rows
        automaton = shape.rules.automaton
        state = empty_rows(
            rows,
            config.block_size + 1,
            config.vocab_size,
            automaton=None if automaton is None else idle_state(automaton, rows),
        )
        self._state = jax.device_put(state, placement.whole)
        self._log = placement.made_by_heads(empty_log, config, rows, shape.page, shape.dtype)
        self._pool = Pool(
            config, rows, size=shape.page, dtype=shape.dtype, placement=placement, longest=shape.longest
        )
        self._rows: list[Row | None] = [None] * rows
        self._begun = [0.0] * rows
        self._lengths = np.zeros(rows, np.int32)
        # Texts that were read, so that the samples of one prompt share its reading.
        self._texts: dict[tuple[int, bytes], Read] = {}

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
        texts = [np.concatenate([row.prompt, plan.forced]) for row, plan in zip(rows, plans, strict=True)]
        reads = self._read_texts([row.prompt for row in rows], texts)
        free = [place for place, row in enumerate(self._rows) if row is None]
        places = free[: len(rows)]
        for place, row, text in zip(places, rows, texts, strict=True):
            self._rows[place], self._begun[place], self._lengths[place] = row, time.perf_counter(), len(text)
        self._keep_pages(places, reads)
        for members in _by_reading(reads):
            size = padded_rows(len(members))
            width = self._shape.config.block_size + 1
            tokens = np.zeros((size, width), np.int32)
            for into, i in zip(tokens, members, strict=False):
                into[: len(texts[i])] = texts[i]
            previous = [plans[i].forced[-1] if len(plans[i].forced) else NO_TOKEN for i in members]
            self._state = fill_places(
                self._state,
                _column([places[i] for i in members], size, fill=len(self._rows)),
                new=NewRows(
                    tokens,
                    _column([len(texts[i]) for i in members], size),
                    _column(previous, size),
                    _column([rows[i].limit for i in members], size),
                    padded(np.stack([rows[i].key for i in members]), size, fill=0),
                    _stacked([plans[i].state for i in members], size),
                ),
                logits=reads[members[0]].reading.logits,
                log_prob=reads[members[0]].reading.log_prob,
                source=_column([reads[i].number for i in members], size),
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
        length, finished, held = jax.device_get((self._state.length, self._state.finished, self._state.held))
        taken = np.array([row is not None for row in self._rows])
        limit = np.array([0 if row is None else row.limit for row in self._rows])
        ended = taken & (finished | (length >= limit))
        written = length - self._lengths
        self._keep_log(np.flatnonzero(taken & ~ended & (written > 0)), written)
        self._lengths = np.where(taken, length, 0)
        results = self._take_out(np.flatnonzero(ended))
        self._serve(np.flatnonzero(held & taken & ~ended))
        return results

    def _plan(self, text: np.ndarray, limit: int) -> Plan:
        automaton = self._shape.rules.automaton
        if automaton is None:
            return Plan(np.zeros(0, np.int32), None)
        return Plan(*automaton.plan(text, limit=limit))

    def _read_texts(self, prompts: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> list[Read]:
        """Each text's reading, made once for all that are equal."""
        names = [(len(prompt), text.tobytes()) for prompt, text in zip(prompts, texts, strict=True)]
        found = {name: self._texts[name] for name in names if name in self._texts}
        new: dict[tuple[int, bytes], Piece] = {}
        for name, prompt, text in zip(names, prompts, texts, strict=True):
            if name not in found:
                new[name] = Piece(text, 0, len(text) - len(prompt), None)
        found |= dict(zip(new, self._read(list(new.values())), strict=True))
        self._texts = dict([*self._texts.items(), *found.items()][-_TEXTS:])
        return [found[name] for name in names]

    def _read(self, pieces: Sequence[Piece]) -> list[Read]:
        shape = self._shape
        return read_pieces(shape.config, self._weights, pieces, pool=self._pool, dtype=shape.dtype)

    def _keep_pages(self, places: Sequence[int], reads: Sequence[Read]) -> None:
        """Give rows the pages that were read for them."""
        targets = [self._pool.assign(place, read.fills) for place, read in zip(places, reads, strict=True)]
        for members in _by_reading(reads):
            self._pool.put(
                reads[members[0]].reading.pages,
                [page for i in members for page in reads[i].pages],
                [page for i in members for page in targets[i]],
            )

    def _keep_log(self, places: np.ndarray, written: np.ndarray) -> None:
        """Give rows what they wrote into the log."""
        if not len(places):
            return
        targets = [self._pool.assign(int(place), [int(written[place])])[0] for place in places]
        self._pool.put(_log_pages(self._log), places.tolist(), targets)

    def _take_out(self, places: np.ndarray) -> list[Ended]:
        if not len(places):
            return []
        seen = jax.device_get(look_at(self._state, padded(places, padded_rows(len(places)), fill=0)))
        results = []
        for i, place in enumerate(places):
            row = self._rows[place]
            if row is None:
                raise RuntimeError(f"place {place} has no row")
            results.append(
                Ended(
                    row,
                    seen.tokens[i, : seen.length[i]],
                    float(seen.log_prob[i]),
                    bool(seen.finished[i]),
                    time.perf_counter() - self._begun[place],
                )
            )
            self._rows[place] = None
            self._lengths[place] = 0
            self._pool.release(int(place))
        return results

    def _serve(self, places: np.ndarray) -> None:
        """Let the rows that are held go on, with the tokens that are forced upon them."""
        if not len(places):
            return
        plans = self._plans_of_held(places)
        moving = [i for i, plan in enumerate(plans) if len(plan.forced)]
        pieces = [
            Piece(plans[i].forced, int(self._lengths[places[i]]), len(plans[i].forced) - 1, int(places[i]))
            for i in moving
        ]
        reads = self._read(pieces)
        self._keep_pages([int(places[i]) for i in moving], reads)
        for members in _by_reading(reads):
            reading = reads[members[0]].reading
            self._go_on(
                places,
                [moving[m] for m in members],
                plans,
                logits=reading.logits,
                log_prob=reading.log_prob,
                source=[reads[m].number for m in members],
            )
        still = [i for i, plan in enumerate(plans) if not len(plan.forced)]
        if still:
            nothing = np.zeros((1, self._shape.config.vocab_size), np.float32)
            self._go_on(places, still, plans, logits=nothing, log_prob=nothing[:, 0], source=[0] * len(still))
        self._lengths[places] += [len(plan.forced) for plan in plans]

    def _plans_of_held(self, places: np.ndarray) -> list[Plan]:
        """What is forced upon held rows: the run ahead of them, or what the planner makes of their text so far."""
        padded_places = padded(places.astype(np.int32), padded_rows(len(places)), fill=0)
        ahead, waiting = jax.device_get(look_ahead(self._shape.rules, self._state, padded_places, width=_RUN))
        seen = jax.device_get(look_at(self._state, padded_places)) if waiting.any() else None
        plans = []
        for i, place in enumerate(places):
            row = self._rows[place]
            if seen is not None and row is not None and waiting[i]:
                plans.append(self._plan(seen.tokens[i, : seen.length[i]], row.limit))
            else:
                state = jax.tree.map(lambda leaf, i=i: leaf[i], ahead.automaton)
                plans.append(Plan(ahead.tokens[i, : ahead.counts[i]], state))
        return plans

    def _go_on(
        self,
        places: np.ndarray,
        members: Sequence[int],
        plans: Sequence[Plan],
        *,
        logits: jax.Array | np.ndarray,
        log_prob: jax.Array | np.ndarray,
        source: Sequence[int],
    ) -> None:
        size = padded_rows(len(members))
        width = padded_count(max(_RUN, *(len(plans[i].forced) for i in members)))
        tokens = np.zeros((size, width), np.int32)
        for into, i in zip(tokens, members, strict=False):
            into[: len(plans[i].forced)] = plans[i].forced
        self._state = go_on(
            self._shape.rules,
            self._state,
            _column([int(places[i]) for i in members], size, fill=len(self._rows)),
            forced=Forced(
                tokens,
                _column([len(plans[i].forced) for i in members], size),
                _stacked([plans[i].state for i in members], size),
            ),
            logits=logits,
            log_prob=log_prob,
            source=_column(source, size),
        )


def _column(values: Sequence[int], size: int, *, fill: int = 0) -> np.ndarray:
    return padded(np.array(values, np.int32), size, fill=fill)


def _stacked(states: Sequence[AutomatonState | None], size: int) -> AutomatonState | None:
    """The rows' states as one, padded with the last."""
    if states[0] is None:
        return None
    filled = [*states, *[states[-1]] * (size - len(states))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)


def _by_reading(reads: Sequence[Read]) -> list[list[int]]:
    """Numbers of the pieces that were read together."""
    groups: dict[int, list[int]] = {}
    for number, read in enumerate(reads):
        groups.setdefault(id(read.reading), []).append(number)
    return list(groups.values())
