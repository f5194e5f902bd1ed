"""Counting dropped records by what their reasons say: what a reason names of its record does not divide them."""

import dataclasses
import re
from typing import NamedTuple

VARIES = "…"
"""Stands in a group's reason for what differs from record to record."""
OTHER_REASONS = "other reasons"
"""The reason of a stage's groups beyond the `most` that are counted apart."""

_MOST_GROUPS = 10_000
_LONGEST = 1000
# What is quoted (an apostrophe inside a word opens and closes nothing), and words with a digit or with punctuation
# inside: numbers, ids, formulas, files. Several with commas between are one, so that lists may differ in length.
_WORD_PART = r"\w./\\#@:~+-"
_VALUE = (
    r"(?:(?<!\w)'.*?'(?!\w)|(?<!\w)\".*?\"(?!\w)"
    rf"|(?<![{_WORD_PART}])[{_WORD_PART}]*?(?:\d|\w[./\\#@:]\w)[,{_WORD_PART}]*(?<=\w))"
)
_VALUES = re.compile(rf"({_VALUE}(?:, {_VALUE})*)")


class DroppedGroup(NamedTuple):
    """Inputs that one stage refused for one reason.

    Attributes:
        stage: the one that refused them.
        reason: what their reasons have in common; what differs in them is `VARIES`.
        inputs: how many there are.
        example: the first one's whole reason.
    """

    stage: str
    reason: str
    inputs: int
    example: str


@dataclasses.dataclass
class _Group:
    stage: str
    example: str
    # Texts and values in turn, a text first.
    pieces: list[str]
    inputs: int = 0


class Reasons:
    """Counts drops by stage and reason.

    Args:
        most: groups that are counted apart, so that memory stays bounded where every reason is another; what comes
            after them is counted by stage alone.
    """

    def __init__(self, most: int = _MOST_GROUPS) -> None:
        self._most = most
        self._groups: dict[tuple[str, ...], _Group] = {}

    def add(self, stage: str, reason: str) -> None:
        """Count one dropped record."""
        pieces = _VALUES.split(reason[:_LONGEST])
        key = (stage, *pieces[::2])
        if key not in self._groups and len(self._groups) >= self._most:
            key, pieces = (stage,), [OTHER_REASONS]
        group = self._groups.setdefault(key, _Group(stage, reason, pieces))
        group.inputs += 1
        group.pieces = [
            piece if piece == other else VARIES for piece, other in zip(group.pieces, pieces, strict=True)
        ]

    def groups(self) -> tuple[DroppedGroup, ...]:
        """What was counted, the largest first."""
        ranked = sorted(self._groups.values(), key=lambda group: -group.inputs)
        return tuple(
            DroppedGroup(group.stage, "".join(group.pieces), group.inputs, group.example) for group in ranked
        )
