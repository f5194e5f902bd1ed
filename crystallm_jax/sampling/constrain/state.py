"""The registers of a batch under constraint, as the device keeps them and as the planner lays them out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum, auto
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.nodes import WORDS, Node

SCRIPT_TOKENS = 384
FIELDS = 16
MAX_ELEMENTS = 12
MAX_MULTIPLICITIES = 8
TABLE_SIZE = 1 << 14
REMEMBERED_SITES = 64
MOST_SITES = REMEMBERED_SITES - 1
"""That a crystal can have at level `positions`: the last place of the register of sites has another use."""


class Placed(IntEnum):
    """What is kept of a site at level `positions`: a column of the register `placed`."""

    ELEMENT = 0
    """Its place among `elements`."""
    MULTIPLICITY = auto()
    ROOM = auto()
    """`room` before its row, as all that follow."""
    INDEX = auto()
    TAKEN = auto()
    FIXED = auto()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AutomatonState:
    """Where each row is in its text, and what its text may still become.

    All int32 where nothing else is said. The planner's states are the same without B.

    Attributes:
        node: [B], a Node.
        place: [B], tokens of the script that are written, each repeated length counted at its width.
        field: [B], index of the field that is being written, or that the script leads to.
        slot: [B], which number is being written, a Slot.
        value, digits, decimals: [B]; of the number so far: without its point, digits before it, digits behind it.
        low, high: [B], bounds of the number in units of its last decimal.
        room: [B], tokens that may still follow.
        cell: [B, 6], lengths and angles in units of the last decimal; 0 for one that is not written yet, or is a
            repeated length.
        edge_digits: [B], of the first cell length before its point.
        group_number: [B], International Tables number of the space group that was drawn.
        site: [B], index of the site that is being written or comes next.
        sites: [B, REMEMBERED_SITES, 2], coordinates x (times 10,000, plus y) and z of sites written, in units of the
            last decimal, within the cell; -1 for none.
        placed: [B, REMEMBERED_SITES, len(Placed)], at level `positions` what else is kept of sites written.
        multiplicity: [B], of the site that is being written.
        fixed: [B], at level `positions` the positions without free parameters that are taken, as bits.
        passed: [B], at level `positions` how many parts of the crystal were looked at and may stay: the cell, then the
            sites.
        element, symbol: [B], the current site's element: its place among `elements`, and its token. In a formula or
            the loop of properties, how many elements it has.
        index, taken: [B], row of the table, and which bounded positions are taken.
        owed: [B], tokens that the elements of the data line cost later, but for the last one's sites.
        rank, unranked: [B], last ranked element of the data line, and which unranked ones it has, as bits.
        repeats: [B, 2], places of the script that repeat the first cell length, rising; beyond its end for none.
        ends, kinds, reserves: [B, FIELDS]; where in the script each field begins, the Kind of it, and the fewest
            tokens that follow it but for sites.
        script: [B, SCRIPT_TOKENS].
        elements, levels, counts, remaining, strides: [B, MAX_ELEMENTS]; the elements of the cell as tokens (-1 for
            none), the places of their levels in the order of sites, their atoms, those not on a site yet, and how far
            a row of the table one step of them is.
        multiplicities, steps, most, weights: [B, MAX_MULTIPLICITIES]; the group's (0 for none), in common steps, how
            many sites can have each (0: any number), and what one more counts in `taken`.
        positions: [B], width of the table.
        most_digits: [B], of a multiplicity.
        table: uint8 [B, TABLE_SIZE], fewest sites that finish the crystal, by index and taken positions.
        groups: uint32 [B, WORDS], space groups that may be drawn.
    """

    node: jax.Array
    place: jax.Array
    field: jax.Array
    slot: jax.Array
    value: jax.Array
    digits: jax.Array
    decimals: jax.Array
    low: jax.Array
    high: jax.Array
    room: jax.Array
    cell: jax.Array
    edge_digits: jax.Array
    group_number: jax.Array
    site: jax.Array
    sites: jax.Array
    placed: jax.Array
    multiplicity: jax.Array
    fixed: jax.Array
    passed: jax.Array
    element: jax.Array
    symbol: jax.Array
    index: jax.Array
    taken: jax.Array
    owed: jax.Array
    rank: jax.Array
    unranked: jax.Array
    repeats: jax.Array
    ends: jax.Array
    kinds: jax.Array
    reserves: jax.Array
    script: jax.Array
    elements: jax.Array
    levels: jax.Array
    counts: jax.Array
    remaining: jax.Array
    strides: jax.Array
    multiplicities: jax.Array
    steps: jax.Array
    most: jax.Array
    weights: jax.Array
    positions: jax.Array
    most_digits: jax.Array
    table: jax.Array
    groups: jax.Array

    @property
    def waiting(self) -> jax.Array:
        """Bool [B]: rows that go on only once the planner has seen their text."""
        return self.node == Node.WAITING

    def where(self, rows: jax.Array, other: Self) -> Self:
        """These registers in the rows [B] that are True, the other's elsewhere. Arrays that are the same stay so."""
        chosen = {}
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if mine is not theirs:
                chosen[entry.name] = jnp.where(rows.reshape(-1, *[1] * (mine.ndim - 1)), mine, theirs)
        return replace(other, **chosen)


class RowPlan(NamedTuple):
    """How a row goes on.

    Attributes:
        forced: int32 [N]; tokens that must follow its text now.
        start: of NumPy arrays without B; the registers before these.
        state: likewise; the registers after these.
    """

    forced: np.ndarray
    start: AutomatonState
    state: AutomatonState


_SHAPES = {
    "cell": (6,),
    "sites": (REMEMBERED_SITES, 2),
    "placed": (REMEMBERED_SITES, len(Placed)),
    "repeats": (2,),
    **dict.fromkeys(("ends", "kinds", "reserves"), (FIELDS,)),
    "script": (SCRIPT_TOKENS,),
    **dict.fromkeys(("elements", "levels", "counts", "remaining", "strides"), (MAX_ELEMENTS,)),
    **dict.fromkeys(("multiplicities", "steps", "most", "weights"), (MAX_MULTIPLICITIES,)),
    "table": (TABLE_SIZE,),
    "groups": (WORDS,),
}
_DTYPES = {"table": np.uint8, "groups": np.uint32}


def empty_row() -> dict[str, Any]:
    """The registers of a row that is done, by name, without B."""
    row = {
        entry.name: np.zeros(_SHAPES.get(entry.name, ()), _DTYPES.get(entry.name, np.int32))
        for entry in fields(AutomatonState)
    }
    row["node"][...] = Node.DONE
    row["elements"][...] = -1
    row["sites"][...] = -1
    row["repeats"][...] = SCRIPT_TOKENS
    row["positions"][...] = 1
    row["weights"][...] = 1
    return row


def stacked(states: Sequence[AutomatonState | None], size: int) -> AutomatonState | None:
    """The states of rows as one of so many rows, padded with the last; None where they have none."""
    if states[0] is None:
        return None
    filled = [*states, *[states[-1]] * (size - len(states))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
