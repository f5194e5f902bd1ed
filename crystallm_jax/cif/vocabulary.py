"""The 371 tokens of the published model, in the order of their ids."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from crystallm_jax.cif.elements import ELEMENTS

UNK_TOKEN = "<unk>"  # noqa: S105 - a token of text
SPACEGROUP_TAG = "_symmetry_space_group_name_H-M"
SPACEGROUP_SUFFIX = "_sg"

SPACEGROUPS: Mapping[str, int] = MappingProxyType(
    json.loads(Path(__file__).with_name("spacegroups.json").read_text(encoding="utf-8"))
)
"""The 227 space groups with a token, in vocabulary order: symbol to International Tables number."""

SPACEGROUPS_WITHOUT_TOKEN: Mapping[str, int] = MappingProxyType({"P4_222": 93, "P6": 168, "P432": 207})
"""The three space groups that the published vocabulary lacks."""

_DIGITS = tuple("0123456789")

_KEYWORDS = (
    "_cell_length_b",
    "_atom_site_occupancy",
    "_atom_site_attached_hydrogens",
    "_cell_length_a",
    "_cell_angle_beta",
    "_symmetry_equiv_pos_as_xyz",
    "_cell_angle_gamma",
    "_atom_site_fract_x",
    SPACEGROUP_TAG,
    "_symmetry_Int_Tables_number",
    "_chemical_formula_structural",
    "_chemical_name_systematic",
    "_atom_site_fract_y",
    "_atom_site_symmetry_multiplicity",
    "_chemical_formula_sum",
    "_atom_site_label",
    "_atom_site_type_symbol",
    "_cell_length_c",
    "_atom_site_B_iso_or_equiv",
    "_symmetry_equiv_pos_site_id",
    "_cell_volume",
    "_atom_site_fract_z",
    "_cell_angle_alpha",
    "_cell_formula_units_Z",
    "loop_",
    "data_",
    "_atom_type_symbol",
    "_atom_type_electronegativity",
    "_atom_type_radius",
    "_atom_type_ionic_radius",
    "_atom_type_oxidation_number",
)

_SYMBOLS = ("x", "y", "z", ".", "(", ")", "+", "-", "/", "'", ",", " ", "\n")

TOKENS: tuple[str, ...] = (
    *ELEMENTS,
    *_DIGITS,
    *_KEYWORDS,
    *_SYMBOLS,
    *(symbol + SPACEGROUP_SUFFIX for symbol in SPACEGROUPS),
    UNK_TOKEN,
)
"""All tokens in id order; those of space groups end in `_sg`."""


def vocabulary_sha256() -> str:
    """SHA-256, in hexadecimal, of the tokens as a JSON list: it tells whose ids a token store holds."""
    return hashlib.sha256(json.dumps(TOKENS).encode()).hexdigest()
