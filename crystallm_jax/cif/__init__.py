"""The text dialect: tokens, prompts, and the way from a structure to a text and back."""

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.postprocess import postprocess_cif
from crystallm_jax.cif.preprocess import preprocess_cif, stream_text
from crystallm_jax.cif.prompts import UNCONDITIONAL_PROMPT, make_prompt, prompt_from_cif
from crystallm_jax.cif.spacegroups import find_spacegroup, spacegroup_operations
from crystallm_jax.cif.symmetry import symmetrized_cif
from crystallm_jax.cif.tokenizer import CIFTokenizer
from crystallm_jax.cif.vocabulary import SPACEGROUPS, vocabulary_sha256
from crystallm_jax.errors import CIFError

__all__ = [
    "ELEMENTS",
    "SPACEGROUPS",
    "UNCONDITIONAL_PROMPT",
    "CIFError",
    "CIFTokenizer",
    "find_spacegroup",
    "make_prompt",
    "postprocess_cif",
    "preprocess_cif",
    "prompt_from_cif",
    "spacegroup_operations",
    "stream_text",
    "symmetrized_cif",
    "vocabulary_sha256",
]
