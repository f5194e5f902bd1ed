"""What a validation says about one text: plain data, light enough to send between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MAX_ERROR_LENGTH = 300


@dataclass(frozen=True, slots=True)
class ValidityReport:
    """The verdicts on one CIF text; a verdict that could not be reached is None.

    Attributes:
        formula_consistent: The formulas of the `data_` line, the sum and the structural entry reduce to the
            same.
        multiplicity_consistent: The site multiplicities add up to the formula sum.
        bond_length_score: Share of CrystalNN bonds of acceptable length, 0 to 1.
        space_group_consistent: The space group found (symprec 0.1 Å) is the one stated.
        sensible: Stated cell lengths within 0.5 to 1000 Å and angles within 10 to 170 degrees.
        valid: Formula, multiplicity, a bond score of 1.0 and the space group all hold.
        error: Why a verdict could not be reached, one line; None if all were.
        reasons: Why the text is not valid, first things first, in short names to count by: "unparsable",
            "formula", "multiplicity", "bond_length", "space_group", "too_large", "timeout", "memory",
            "crashed". Empty exactly if valid.
    """

    formula_consistent: bool | None = None
    multiplicity_consistent: bool | None = None
    bond_length_score: float | None = None
    space_group_consistent: bool | None = None
    sensible: bool | None = None
    valid: bool = False
    error: str | None = None
    reasons: tuple[str, ...] = ()


class Judgement(NamedTuple):
    """The verdicts on one text, and its structure for other programs.

    Attributes:
        report: The verdicts.
        frame: The structure as a frame of an extxyz file; None where the text holds none.
        symmetrized: The structure as a symmetrised CIF; None likewise.
        omitted: Why one of them could not be written though the text holds a structure, one line.
    """

    report: ValidityReport
    frame: str | None = None
    symmetrized: str | None = None
    omitted: str | None = None


def failed(reason: str, message: str) -> ValidityReport:
    """The report of a text about which nothing is known but why."""
    return ValidityReport(error=one_line(message), reasons=(reason,))


def one_line(message: str) -> str:
    """The message without line breaks or unprintable characters, cut to 300 characters."""
    printable = "".join(
        character if character.isprintable() else " " for character in message[: 4 * MAX_ERROR_LENGTH]
    )
    line = " ".join(printable.split())
    return line if len(line) <= MAX_ERROR_LENGTH else line[: MAX_ERROR_LENGTH - 1] + "…"
