"""The published verdicts on a generated CIF text, from one parse, within limits, without ever raising."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pymatgen.core import Composition, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from crystallm_jax.cif import postprocess_cif
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation.bonds import DeadlineError, bond_length_score
from crystallm_jax.evaluation.parsing import (
    MAX_CHARACTERS,
    ParsedCIF,
    TooLargeError,
    build_structure,
    describe,
    parse_blocks,
)
from crystallm_jax.evaluation.verdict import ValidityReport, one_line

SYMPREC = 0.1  # Å
LENGTHS = (0.5, 1000.0)  # Å
ANGLES = (10.0, 170.0)  # degrees
MAX_FORMULA = 1_000
MAX_RAW = 100_000  # characters; 3,000 tokens have less

DATA_FORMULA = re.compile(r"data_([A-Za-z0-9]+)\n")
CELL_VALUE = re.compile(
    r"_cell_(length_[abc]|angle_(?:alpha|beta|gamma))\s+([-+]?(?:[.\d]+|nan|inf))", re.IGNORECASE
)
# What a model writes and postprocess_cif takes out again.
RAW_MARK = re.compile(
    r"^_atom_type_electronegativity$|^_symmetry_equiv_pos_as_xyz\n1 +'x, y, z'$", re.MULTILINE
)
SPACES = re.compile(r"[ \t]+")

T = TypeVar("T")


class Examination(NamedTuple):
    """The verdicts on a text, and the structure that they are about; None where there is none."""

    report: ValidityReport
    structure: Structure | None


def validate(cif: str, *, time_limit: float = 60.0) -> ValidityReport:
    """Judges a CIF text as the published implementation does.

    Args:
        cif: A post-processed text, or the raw output of a model, which is post-processed first.
        time_limit: Seconds, checked between steps and between sites. A single step inside a library is not
            interrupted: `ValidatorPool` ends those too.

    Returns:
        The verdicts. All that can be computed are, whichever fails first. Never raises on a bad text.
    """
    return examine(cif, time_limit=time_limit).report


def examine(cif: str, *, time_limit: float = 60.0) -> Examination:
    """Judges a CIF text as `validate` does, and gives the structure too."""
    deadline = time.monotonic() + time_limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _judge(cif, deadline)


def ordinary_text(cif: str) -> str:
    """The text as an ordinary CIF: post-processed if it still is as a model writes it and can be."""
    if len(cif) > MAX_RAW or RAW_MARK.search(cif) is None:
        return cif
    try:
        return postprocess_cif(SPACES.sub(" ", cif))  # tokens know no wider space
    except CIFError:
        return cif  # the published implementation judges such a text as it is


def is_formula_consistent(text: str, parsed: ParsedCIF) -> bool:
    """Whether the formulas of the data line, the sum and the structural entry reduce to the same.

    Raises:
        CIFError: A formula is missing or too long.
    """
    match = DATA_FORMULA.search(text)
    if match is None:
        raise CIFError("no line data_FORMULA: a text starts with one")
    entries = [
        match.group(1),
        *(_item(parsed, f"_chemical_formula_{kind}") for kind in ("sum", "structural")),
    ]
    return len({_composition(entry).reduced_formula for entry in entries}) == 1


def is_multiplicity_consistent(parsed: ParsedCIF) -> bool:
    """Whether the multiplicities of the site rows, of all blocks, add up to the formula sum.

    Raises:
        CIFError: The formula sum is missing or too long.
    """
    expected = _composition(_item(parsed, "_chemical_formula_sum")).as_dict()
    found: dict[str, int] = {}
    for items in parsed.blocks.values():
        symbols = items.get("_atom_site_type_symbol", ())
        for symbol, multiplicity in zip(
            symbols, items.get("_atom_site_symmetry_multiplicity", ()), strict=False
        ):
            found[symbol] = found.get(symbol, 0) + int(multiplicity)
    return bool(expected == found)


def is_space_group_consistent(structure: Structure, parsed: ParsedCIF) -> bool:
    """Whether the symmetry found with symprec 0.1 Å has the symbol that the first block states.

    Raises:
        CIFError: The text states none.
    """
    stated = _item(parsed, "_symmetry_space_group_name_H-M")
    found = SpacegroupAnalyzer(structure, symprec=SYMPREC).get_space_group_symbol()
    return bool(stated.strip() == found.strip())


def is_sensible(text: str) -> bool:
    """Whether every stated cell length is within 0.5 to 1000 Å and every angle within 10 to 170 degrees.

    A text that states none passes, as published; a number that is negative, infinite or none fails.
    """
    for kind, written in CELL_VALUE.findall(text):
        low, high = LENGTHS if kind.lower().startswith("length") else ANGLES
        try:
            value = float(written)
        except ValueError:  # "1.2.3"
            value = math.nan
        if not low <= value <= high:
            return False
    return True


def _judge(cif: str, deadline: float) -> Examination:
    """The report on a text, cheap verdicts first, and its structure."""
    findings = _Findings()
    text = findings.attempt("unparsable", lambda: ordinary_text(cif))
    if text is None:
        return Examination(findings.report(), None)
    parsed = findings.attempt("unparsable", lambda: parse_blocks(text))
    sensible = is_sensible(text[:MAX_CHARACTERS])
    if parsed is None:
        return Examination(findings.report(sensible=sensible), None)
    formula = findings.judge("formula", lambda: is_formula_consistent(text, parsed))
    multiplicity = findings.judge("multiplicity", lambda: is_multiplicity_consistent(parsed))
    built = findings.attempt("unparsable", lambda: build_structure(parsed))
    structure = score = space_group = None
    if built is not None:
        structure, operators = built
        # The space group takes milliseconds, the bonds up to minutes; among the reasons bonds come first.
        later = _Findings()
        space_group = later.judge("space_group", lambda: is_space_group_consistent(structure, parsed))
        score = findings.attempt(
            "bond_length", lambda: bond_length_score(structure, operators, deadline=deadline)
        )
        if score is not None and score < 1.0:
            findings.reasons.append("bond_length")
        findings.extend(later)
    report = findings.report(
        formula_consistent=formula,
        multiplicity_consistent=multiplicity,
        bond_length_score=score,
        space_group_consistent=space_group,
        sensible=sensible,
    )
    return Examination(report, structure)


class _Findings:
    """The reasons and errors gathered on the way through one text."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.errors: list[str] = []

    def attempt(self, reason: str, compute: Callable[[], T]) -> T | None:
        """The result, or None and a reason: on text from a model any library call may raise anything."""
        try:
            return compute()
        except Exception as error:  # noqa: BLE001 - kept: the class and message go into the report
            if isinstance(error, TooLargeError):
                reason = "too_large"
            elif isinstance(error, DeadlineError):
                reason = "timeout"
            elif isinstance(error, MemoryError):
                reason = "memory"
            self.reasons.append(reason)
            self.errors.append(str(error) if isinstance(error, CIFError) else f"{reason}: {describe(error)}")
            return None

    def judge(self, reason: str, compute: Callable[[], bool]) -> bool | None:
        """A verdict; a negative one leaves its reason."""
        verdict = self.attempt(reason, compute)
        if verdict is False:
            self.reasons.append(reason)
        return verdict

    def extend(self, later: _Findings) -> None:
        """Appends what was found beside this."""
        self.reasons += later.reasons
        self.errors += later.errors

    def report(self, **verdicts: Any) -> ValidityReport:
        """The report; a text without a reason against it is valid."""
        error = one_line("; ".join(self.errors)) if self.errors else None
        reasons = tuple(dict.fromkeys(self.reasons))
        return ValidityReport(**verdicts, valid=not reasons, error=error, reasons=reasons)


def _item(parsed: ParsedCIF, name: str) -> str:
    """A single value of the first block."""
    value = parsed.first.get(name)
    if not isinstance(value, str):
        raise CIFError(f"the text states no {name}: add it to the first data block")
    return value


def _composition(formula: str) -> Composition:
    if len(formula) > MAX_FORMULA:
        raise CIFError(f"a formula of {len(formula):,} characters: at most {MAX_FORMULA:,} are read")
    return Composition(formula)
