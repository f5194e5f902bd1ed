"""Crystal structures from a language model of CIF text: CrystaLLM in JAX and Flax.

Names are loaded when they are first used: importing the package is instant and imports neither JAX nor pymatgen.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crystallm_jax.api import CrystalModel, load_model, new_model
    from crystallm_jax.cif import (
        CIFTokenizer,
        make_prompt,
        postprocess_cif,
        preprocess_cif,
        stream_text,
        symmetrized_cif,
    )
    from crystallm_jax.errors import (
        CIFError,
        ConfigError,
        CrystallmError,
        DataError,
        ModelError,
        SamplingError,
    )
    from crystallm_jax.evaluation import ValidityReport, match, validate
    from crystallm_jax.numpy_model import NumpyModel, load_numpy, save_numpy
    from crystallm_jax.samples import Sample

_HOMES = {
    "crystallm_jax.api": ("CrystalModel", "load_model", "new_model"),
    "crystallm_jax.cif": (
        "CIFTokenizer",
        "make_prompt",
        "postprocess_cif",
        "preprocess_cif",
        "stream_text",
        "symmetrized_cif",
    ),
    "crystallm_jax.errors": (
        "CIFError",
        "ConfigError",
        "CrystallmError",
        "DataError",
        "ModelError",
        "SamplingError",
    ),
    "crystallm_jax.evaluation": ("ValidityReport", "match", "validate"),
    "crystallm_jax.numpy_model": ("NumpyModel", "load_numpy", "save_numpy"),
    "crystallm_jax.samples": ("Sample",),
}

__all__ = [
    "CIFError",
    "CIFTokenizer",
    "ConfigError",
    "CrystalModel",
    "CrystallmError",
    "DataError",
    "ModelError",
    "NumpyModel",
    "Sample",
    "SamplingError",
    "ValidityReport",
    "load_model",
    "load_numpy",
    "make_prompt",
    "match",
    "new_model",
    "postprocess_cif",
    "preprocess_cif",
    "save_numpy",
    "stream_text",
    "symmetrized_cif",
    "validate",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'crystallm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
