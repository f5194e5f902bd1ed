"""From the text of a row so far to how it goes on: what is forced, and the registers after that."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from crystallm_jax.cif.formula import cell_formula, parse_formula
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, SPACEGROUP_TAG, SPACEGROUPS, TOKENS
from crystallm_jax.errors import CIFError, SamplingError
from crystallm_jax.sampling.constrain.costs import sites_cost
from crystallm_jax.sampling.constrain.nodes import KINDS, TOKEN_ID, Kind, Node, token_set
from crystallm_jax.sampling.constrain.sites import Counts, SitePlan, groups_within, plan_sites
from crystallm_jax.sampling.constrain.state import MAX_ELEMENTS, AutomatonState, RowPlan, empty_row
from crystallm_jax.sampling.constrain.text_layout import (
    REPEAT_TOKEN,
    WITH_GROUP,
    Layout,
    Level,
    after_group,
    before_group,
    lay_out,
)

_BEGINNING = re.compile(
    rf"data_(?:([A-Za-z0-9.]+)\n(?:loop_\n([\s\S]*?){SPACEGROUP_TAG} +(\S+){SPACEGROUP_SUFFIX}(\n?))?)?"
)
# Tokens of the rest of a text that hang on the composition but are not counted by element and digit: number of
# formula units, quotes, brackets.
_DATA_SLACK = 16


@lru_cache(maxsize=1024)
def plan_row(level: Level, text: bytes, limit: int) -> RowPlan:
    """The plan of a row of little-endian uint16 token ids, as `Automaton.plan` says; its arrays are read-only."""
    plan = _plan(level, np.frombuffer(text, "<u2"), limit)
    for array in jax.tree.leaves(plan):
        array.setflags(write=False)
    return plan


def _plan(level: Level, ids: np.ndarray, limit: int) -> RowPlan:
    if ids.size and ids.max() >= len(TOKENS):
        raise SamplingError(f"token id {ids.max()} is none of the {len(TOKENS)} of the vocabulary")
    written = "".join([TOKENS[i] for i in ids])
    beginning = _BEGINNING.fullmatch(written)
    if beginning is None:
        raise SamplingError(
            f"prompt {written[:60]!r} cannot be constrained: it must be 'data_', or end with the data_ line or with "
            f"the {SPACEGROUP_TAG} line; make it with make_prompt"
        )
    formula, block, symbol, ended = beginning.groups()
    if formula is None:
        return _row(
            _data_layout(level), _any_sites(level), used=len(ids), limit=limit, what="a file", level=level
        )
    try:
        counts = tuple(parse_formula(formula).items())
    except CIFError as error:
        raise SamplingError(f"prompt {written[:60]!r} cannot be constrained: {error}") from None
    what = cell_formula(dict(counts))
    if level != "syntax" and len(counts) > MAX_ELEMENTS:
        raise SamplingError(
            f"composition {what} has {len(counts)} elements: at most {MAX_ELEMENTS} can be constrained"
        )
    if symbol is None:
        return _before_group(level, counts, used=len(ids), limit=limit)
    described = [row.split()[0] for row in block.splitlines() if row.strip() and not row.startswith("_")]
    if level != "syntax" and set(described) != {element for element, _ in counts}:
        raise SamplingError(
            f"the prompt has the properties of {', '.join(described)[:60]}, not of {what}: make it with make_prompt"
        )
    layout = _after_group(level, counts, symbol)
    if ended:
        layout = Layout((layout.pieces[0][1:], *layout.pieces[1:]), layout.kinds)
    sites = _fewest_rows() if level == "syntax" else plan_sites(level, counts, symbol, limit=limit)
    group = {"group_number": np.array(SPACEGROUPS[symbol], np.int32)}
    sites = sites._replace(registers={**sites.registers, **group})
    return _row(layout, sites, used=len(ids), limit=limit, what=what, level=level)


def _before_group(level: Level, counts: Counts, *, used: int, limit: int) -> RowPlan:
    """The plan of a row that has its composition, but not its space group."""
    known = dict(counts)
    parts = before_group(level, known)
    groups = list(SPACEGROUPS)
    sites = SitePlan({}, 0)
    what = cell_formula(known)
    if level in WITH_GROUP:
        layout = lay_out([*parts, ("", Kind.WAIT)])
        spent = used + layout.least_tokens(0)
        groups = groups_within(level, counts, spent=spent, limit=limit)
    else:
        layout = lay_out(parts + after_group(level, known, None))
        sites = _fewest_rows() if level == "syntax" else plan_sites(level, counts, None, limit=limit)
    sites = sites._replace(registers={**sites.registers, "groups": _group_set(groups)})
    return _row(layout, sites, used=used, limit=limit, what=what, level=level)


def _row(layout: Layout, sites: SitePlan, *, used: int, limit: int, what: str, level: Level) -> RowPlan:
    """The plan of a layout whose first piece is forced now.

    Raises:
        SamplingError: the limit is too small.
    """
    row = empty_row()
    row["groups"][...] = _group_set(SPACEGROUPS)
    for name, register in sites.registers.items():
        row[name][...] = register
    forced = np.array(layout.pieces[0], np.int32)
    first = KINDS[layout.kinds[0]]
    after = {"node": int(first.node), "place": len(forced), "low": first.low, "high": first.high}
    if level == "positions" and layout.kinds[0] == Kind.EDGE:
        # The bounds of the first length are found where the others' are: one token before it is left to be drawn.
        forced = forced[:-1]
        after = {"node": int(Node.SCRIPT), "place": len(forced)}
    needed = used + layout.least_tokens(0) + sites.least_tokens
    if needed > limit:
        raise SamplingError(
            f"a limit of {limit} tokens is too small for {what} at level {level}: the shortest such file takes "
            f"{needed}, prompt included"
        )
    script = [token for piece in layout.pieces for token in piece]
    ends = np.cumsum([len(piece) for piece in layout.pieces])
    repeats = [place for place, token in enumerate(script) if token == REPEAT_TOKEN]
    row["script"][: len(script)] = script
    row["ends"][: len(ends)] = ends
    row["repeats"][: len(repeats)] = repeats
    row["kinds"][: len(layout.kinds)] = layout.kinds
    for field in range(len(layout.kinds)):
        row["reserves"][field] = layout.least_tokens(field + 1) + sites.least_tokens
    after["room"] = limit - used - len(forced)
    start = {"node": int(Node.SCRIPT), "room": limit - used} if len(forced) else after
    return RowPlan(forced, _with(row, start), _with(row, after))


def _with(row: dict[str, Any], changed: dict[str, int]) -> AutomatonState:
    return AutomatonState(**{**row, **{name: np.array(value, np.int32) for name, value in changed.items()}})


def _group_set(symbols: Iterable[str]) -> np.ndarray:
    """The tokens of space groups."""
    return token_set([TOKEN_ID[symbol + SPACEGROUP_SUFFIX] for symbol in symbols])


def _data_layout(level: Level) -> Layout:
    """The layout of a text whose composition is the model's choice."""
    if level == "syntax":
        (first, kind), *parts = before_group(level, {}) + after_group(level, {}, None)
        return lay_out([("", Kind.DATA), (f"\n{first}", kind), *parts])
    return lay_out([("", Kind.DATA), ("\n", Kind.WAIT)])


def _any_sites(level: Level) -> SitePlan:
    """The fewest tokens behind a data line that is the model's choice, but for those of its elements."""
    if level == "syntax":
        return _fewest_rows()
    hydrogen = {"H": 1}
    rest = lay_out(before_group(level, hydrogen) + after_group(level, hydrogen, None))
    return SitePlan({}, rest.least_tokens(0) + _DATA_SLACK + sites_cost(1, 1))


def _fewest_rows() -> SitePlan:
    """A site table of one row."""
    return SitePlan({}, sites_cost(1, 1))


@lru_cache(maxsize=1024)
def _after_group(level: Level, counts: Counts, symbol: str) -> Layout:
    return lay_out(after_group(level, dict(counts), symbol if level in WITH_GROUP else None))
