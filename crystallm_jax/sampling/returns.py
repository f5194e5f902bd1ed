"""Where a row goes back to when a part of its crystal cannot stay: a function of what failed in it so far.

Parts are the cell, 0, and the sites in the order of the text, from 1 on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

CELL = 0
# A part is drawn anew so often before some of those before it are. Measured on the package model: see
# `benchmarks/results/positions.json`.
TRIES = 6
# A row goes back so often in all.
BUDGET = 96


@dataclass(frozen=True)
class History:
    """What failed in a row.

    Attributes:
        tries: how often each part failed since what stands before it was drawn.
        escapes: how often more than a part was given up since the cell was drawn.
        returns: how often the row went back.
    """

    tries: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    escapes: int = 0
    returns: int = 0


def go_back(history: History, part: int) -> tuple[History, int | None]:
    """The history with one more failure, of a part, and the part that is drawn anew; None where the row is given up.

    A part that failed `TRIES` times is given up with one before it; the next time with two, four, … until only the cell
    is left.
    """
    if history.returns >= BUDGET:
        return history, None
    tries, escapes, target = {**history.tries, part: history.tries.get(part, 0) + 1}, history.escapes, part
    if tries[part] >= TRIES and part != CELL:
        target = max(part - 2**escapes, CELL)
        escapes += 1
    if target == CELL:
        tries, escapes = {}, 0
    elif target != part:
        tries = {earlier: count for earlier, count in tries.items() if earlier <= target}
    return History(MappingProxyType(tries), escapes, history.returns + 1), target


def go_back_each(histories: list[History], failed: Mapping[int, int]) -> tuple[dict[int, int], list[int]]:
    """Where each row of a batch goes back to whose part failed, by its place; their histories are replaced.

    Returns:
        The parts by place; the places of rows that are given up.
    """
    back, unplaced = {}, []
    for place, part in failed.items():
        histories[place], target = go_back(histories[place], part)
        if target is None:
            unplaced.append(place)
        else:
            back[place] = target
    return back, unplaced
