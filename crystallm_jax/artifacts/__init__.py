"""The published files of CrystaLLM by name: downloaded once, checked, kept, unpacked."""

from crystallm_jax.artifacts.cache import artifact_folder, cache_folder, converted_folder
from crystallm_jax.artifacts.fetching import fetch
from crystallm_jax.artifacts.table import model_archives
from crystallm_jax.artifacts.unpacking import checkpoint_of, unpack

__all__ = [
    "artifact_folder",
    "cache_folder",
    "checkpoint_of",
    "converted_folder",
    "fetch",
    "model_archives",
    "unpack",
]
