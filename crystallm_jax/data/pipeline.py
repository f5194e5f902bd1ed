"""One record through preparation: CIF text → structure → symmetrised text → standardised text → tokens."""

import os
import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.data.record import Record
from crystallm_jax.data.structures import parse_structure
from crystallm_jax.errors import CIFError

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
_FORMULA = re.compile(r"_chemical_formula_sum\s+(?:'([^'\n]+)'|(\S+))")
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


class Options(NamedTuple):
    """What the text of a record depends on; `dedup` asks for the key by which duplicates are found."""

    symprec: float
    decimal_places: int
    dedup: bool


class Prepared(NamedTuple):
    """A record that is kept: `tokens` uint16 [T]; for deduplication its key and volume (Å³) a unit."""

    tokens: np.ndarray
    key: tuple[str, str] | None
    volume: float


class Dropped(NamedTuple):
    """A record that is not kept: the stage that refused it, and why in one line."""

    stage: str
    reason: str


def prepare_one(record: Record, options: Options) -> Prepared | Dropped:
    """Prepare one record; never raises for what is wrong with the record.

    A text that has the property block of the dialect is taken as it stands, only stripped and tokenised.
    """
    if record.problem is not None:
        return Dropped("read", record.problem)
    stage = "parse"
    try:
        if _PREPARED.search(record.text):
            text = preprocessed = record.text
        else:
            structure = parse_structure(record.text)
            stage = "symmetrise"
            text = symmetrized_cif(structure, options.symprec)
            stage = "preprocess"
            preprocessed = preprocess_cif(text, decimal_places=options.decimal_places)
        stage = "tokenise"
        tokens = _encode(stream_text(preprocessed))
        stage = "dedup"
        key, volume = _duplicate_key(text) if options.dedup else (None, 0.0)
    except _FAILURES as error:
        name = "" if isinstance(error, CIFError) else f"{type(error).__name__}: "
        return Dropped(stage, name + (" ".join(str(error).split()) or "no reason given"))
    return Prepared(tokens, key, volume)


def prepare_batch(records: Sequence[Record], options: Options) -> list[Prepared | Dropped]:
    """Prepare some records, in their order."""
    return [prepare_one(record, options) for record in records]


def warm_up() -> None:
    """Start a worker: load what the first record would otherwise pay for out of its time, and keep quiet."""
    warnings.simplefilter("ignore")
    os.environ.setdefault(
        "SPGLIB_WARNING", "OFF"
    )  # else its C code writes a line for each tolerance it tries
    prepare_one(Record("warm-up", _WARM_UP), Options(0.1, 4, dedup=False))


@cache
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


def _duplicate_key(text: str) -> tuple[tuple[str, str], float]:
    """(cell formula, space group) and the volume a formula unit, as stated in the text."""
    found = [pattern.search(text) for pattern in (_FORMULA, _SPACEGROUP, _VOLUME, _UNITS)]
    names = (
        "_chemical_formula_sum",
        "_symmetry_space_group_name_H-M",
        "_cell_volume",
        "_cell_formula_units_Z",
    )
    missing = [name for name, match in zip(names, found, strict=True) if match is None]
    if missing:
        raise CIFError(f"the text has no {missing[0]}, by which duplicates are found: leave out --dedup")
    formula, spacegroup, volume, units = (next(filter(None, match.groups())) for match in found if match)
    return (formula, spacegroup), float(volume) / max(int(units), 1)
