"""One record through preparation: CIF text → structure → symmetrised text → standardised text → tokens."""

import dataclasses
import functools
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.cif.oxidation import take_oxidation_states
from crystallm_jax.data.reading.texts import printable
from crystallm_jax.data.record import Record
from crystallm_jax.errors import CIFError, ConfigError

if TYPE_CHECKING:
    from pymatgen.core import Structure

Stage: TypeAlias = Literal["symmetrise", "preprocess", "tokenise"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""The stages that a record goes through, in their order."""

# What pymatgen, spglib and NumPy raise on texts that are wrong; anything else is a defect and ends the run.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
_PREPARED = re.compile(r"^\s*_atom_type_symbol\s*\n\s*_atom_type_electronegativity\b", re.MULTILINE)
_FORMULA = re.compile(r"_chemical_formula_sum\s+(?:'([^'\n]+)'|([^\s';]+))")
_SPACEGROUP = re.compile(r"_symmetry_space_group_name_H-M\s+(?:'([^'\n]+)'|(\S+))")
_VOLUME = re.compile(r"_cell_volume\s+([\d.]+)")
_UNITS = re.compile(r"_cell_formula_units_Z\s+(\d+)")

_WARM_UP = """data_NaCl
_symmetry_space_group_name_H-M   'P 1'
_cell_length_a   3.99
_cell_length_b   3.99
_cell_length_c   3.99
_cell_angle_alpha   60.0
_cell_angle_beta   60.0
_cell_angle_gamma   60.0
loop_
 _symmetry_equiv_pos_site_id
 _symmetry_equiv_pos_as_xyz
  1  'x, y, z'
loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_symmetry_multiplicity
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy
  Na  Na0  1  0.0  0.0  0.0  1
  Cl  Cl1  1  0.5  0.5  0.5  1
"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What becomes of each record.

    Attributes:
        stages: those to go through, neighbours in `STAGES`; none passes texts on as they are. A text that already
            has the property block of the dialect passes `symmetrise` and `preprocess` unchanged.
        symprec: tolerance in Å within which symmetry is found.
        decimal_places: of the numbers in the text.
        oxidation_states: whether the property block has a column of them (the published `--oxi`).
    """

    stages: tuple[Stage, ...] = STAGES
    symprec: float = 0.1
    decimal_places: int = 4
    oxidation_states: bool = False

    def __post_init__(self) -> None:
        wanted = tuple(self.stages)
        if wanted not in [STAGES[i:j] for i in range(4) for j in range(i, 4)]:
            raise ConfigError(
                f"stages {','.join(wanted)}: give neighbours of {','.join(STAGES)}, in this order, or none"
            )
        if not 0 < self.symprec <= 1:
            raise ConfigError(
                f"symprec is {self.symprec}, a length in Å: give one above 0 and at most 1, such as 0.1"
            )
        if not 1 <= self.decimal_places <= 12:
            raise ConfigError(f"{self.decimal_places} decimal places: give 1 to 12, such as 4")
        if self.oxidation_states and "preprocess" not in wanted:
            raise ConfigError(
                "oxidation states are written by the stage preprocess: add it, or leave them out"
            )

    @property
    def gives_tokens(self) -> bool:
        """Whether tokens come out; otherwise texts."""
        return "tokenise" in self.stages


class Key(NamedTuple):
    """What sets of records are compared by: cell formula, space group, reduced formula, units, volume (Å³)."""

    formula: str
    spacegroup: str
    reduced: str
    units: int
    volume: float


class Prepared(NamedTuple):
    """A record that is kept: its tokens (little-endian uint16) or its text (UTF-8), and its key if it states one."""

    payload: bytes
    key: Key | None


class Dropped(NamedTuple):
    """A record that is not kept: the stage that refused it, why in one line, and its key if it got that far."""

    stage: str
    reason: str
    key: Key | None = None


Outcome: TypeAlias = Prepared | Dropped


def prepare_one(record: Record, recipe: Recipe) -> Outcome:
    """Prepare one record; never raises for what is wrong with the record."""
    if record.problem is not None:
        return Dropped("read", printable(record.problem))
    stage, key = "parse", None
    try:
        text = record.text
        ready = record.form == "cif" and _PREPARED.search(text) is not None
        _check_form(record, recipe, ready=ready)
        oxidation_states: bool | Mapping[str, float] = recipe.oxidation_states
        if "symmetrise" in recipe.stages and not ready:
            structure = _structure(record)
            stage = "symmetrise"
            text = symmetrized_cif(structure, recipe.symprec)
            oxidation_states = recipe.oxidation_states and _oxidation_states(record, structure)
        key = _key(text)
        if "preprocess" in recipe.stages and not ready:
            stage = "preprocess"
            text = preprocess_cif(
                text, decimal_places=recipe.decimal_places, oxidation_states=oxidation_states
            )
        if not recipe.gives_tokens:
            return Prepared(text.encode(), key)
        stage = "tokenise"
        return Prepared(_encode(stream_text(text)).astype("<u2").tobytes(), key)
    except _FAILURES as error:
        name = "" if isinstance(error, CIFError) else f"{type(error).__name__}: "
        return Dropped(stage, name + (printable(str(error)) or "no reason given"), key)


def prepare_batch(records: Sequence[Record], recipe: Recipe) -> list[Outcome]:
    """Prepare some records, in their order."""
    return [prepare_one(record, recipe) for record in records]


def warm_up() -> None:
    """Start a worker: load what the first record would otherwise pay for out of its time, and keep quiet."""
    warnings.simplefilter("ignore")
    # Its C code would write a line for each tolerance that it tries.
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    prepare_one(Record("warm-up", _WARM_UP), Recipe())


def _check_form(record: Record, recipe: Recipe, *, ready: bool) -> None:
    """Refuse a record that the first stage cannot begin with."""
    if record.form != "cif" and "symmetrise" not in recipe.stages:
        raise CIFError("it is a structure and no CIF text: begin with the stage symmetrise")
    if recipe.stages == ("symmetrise",) and ready:
        raise CIFError("its text is preprocessed already, with the operations cut: begin with tokenise")
    if recipe.stages == ("tokenise",) and not ready:
        raise CIFError("its text is not preprocessed (it has no property block): begin with preprocess")


def _structure(record: Record) -> "Structure":
    from crystallm_jax.data.reading.frames import structure_of  # noqa: PLC0415  pymatgen, for this stage alone

    return structure_of(record)


def _oxidation_states(record: Record, structure: "Structure") -> Mapping[str, float] | bool:
    """Those that the text states, which symmetrising drops; True, to guess them, unless it does for all elements."""
    stated = take_oxidation_states(record.text).states if record.form == "cif" else {}
    return stated if {element.symbol for element in structure.composition.elements} <= stated.keys() else True


@functools.cache
def _tokenizer() -> CIFTokenizer:
    return CIFTokenizer()


def _encode(text: str) -> np.ndarray:
    """Token ids of one record, uint16 [T].

    Raises:
        CIFError: no record or several, or a piece of text that has no token.
    """
    tokenizer = _tokenizer()
    tokens = tokenizer.encode_cif(text)
    starts = np.flatnonzero(tokens == tokenizer.token_to_id["data_"])
    if len(starts) != 1 or starts[0] != 0:
        raise CIFError(
            f"the text has {len(starts)} 'data_' lines, one at its beginning is wanted: one crystal a record"
        )
    if np.any(tokens == tokenizer.unk_id):
        line = next(
            line for line in text.splitlines() if tokenizer.unk_id in tokenizer.encode_cif(line + "\n")
        )
        raise CIFError(f"the line {line[:80]!r} holds what is not in the vocabulary: leave the record out")
    return tokens


def _key(text: str) -> Key | None:
    """The key that a text states; None where a part of it is missing."""
    found = [pattern.search(text) for pattern in (_FORMULA, _SPACEGROUP, _VOLUME, _UNITS)]
    if not all(found):
        return None
    formula, spacegroup, volume, units = (next(filter(None, match.groups())) for match in found if match)
    try:
        counts = parse_formula(formula)
        size = float(volume)
    except (CIFError, ValueError):  # the stages say so; a text that passes through unread has no key
        return None
    common = math.gcd(*counts.values())
    reduced = "".join(f"{symbol}{counts[symbol] // common}" for symbol in sorted(counts))
    return Key("".join(formula.split()), spacegroup, reduced, int(units), size)
