"""Where on this machine is kept what can be had again: downloads, converted models, compiled steps."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$CRYSTALLM_CACHE`, else `crystallm_jax` in the user's cache folder; it need not be there yet."""
    if os.environ.get("CRYSTALLM_CACHE"):
        return Path(os.environ["CRYSTALLM_CACHE"]).expanduser().absolute()
    # A cache folder that is no absolute path is to be ignored, says the standard that names the variable.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "crystallm_jax"


def artifact_folder() -> Path:
    """Where the published files are kept, under their own names."""
    return cache_folder() / "artifacts"


def converted_folder(name: str) -> Path:
    """Where the model of a published archive is kept once it is converted, `name` being the archive's without ending.

    It need not be there yet.
    """
    return cache_folder() / "models" / name
