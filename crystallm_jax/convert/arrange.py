"""Parameters by name, as files hold them, and as nested dicts, as the model takes them.

In files a parameter is named by its path joined by dots (`h_0.attn.c_attn.kernel`) and is a matrix or a vector, as
`parameter_table` says. Read are also the layouts of training: layers stacked under `h`, and `c_attn` as three kernels
side by side ([D, 3, D]), which earlier versions kept as one ([D, 3 D]): the same numbers in the same order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from crystallm_jax.convert.names import parameter_table
from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig

_STACKED = "h"


def named_arrays(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters of an unrolled model by name, in the shapes of files."""
    named = flattened(params)
    return {
        name: named[name].reshape(entry.shape)
        for entry in parameter_table(config).values()
        for name in (".".join(entry.path),)
    }


def params_from_named(
    named: Mapping[str, np.ndarray], config: ModelConfig, *, place: str, finite: bool = True
) -> dict[str, Any]:
    """Arrange named arrays into the nested float32 parameters of `GPT`.

    Args:
        named: by name; of a type that becomes float32.
        config: the shape of the model.
        place: where they come from, for the message.
        finite: whether numbers that are not finite are refused.

    Raises:
        ModelError: one is missing, left over, of another shape than `config` asks for, or not finite.
    """
    remaining = unstacked_names(named)
    params: dict[str, Any] = {}
    for entry in parameter_table(config).values():
        name = ".".join(entry.path)
        if name not in remaining:
            raise ModelError(f"{place}: tensor {name} is missing")
        value = remaining.pop(name)
        if value.shape not in (entry.shape, entry.held):
            raise ModelError(
                f"{place}: tensor {name} has shape {value.shape}; the configuration asks for {entry.shape}"
            )
        value = np.ascontiguousarray(value, np.float32).reshape(entry.held)
        if finite and not np.isfinite(value).all():
            raise ModelError(f"{place}: tensor {name} holds numbers that are not finite: get another copy")
        inner = params
        for part in entry.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[entry.path[-1]] = value
    if remaining:
        raise ModelError(f"{place}: tensors that no parameter takes: {', '.join(sorted(remaining)[:5])}")
    return params


def flattened(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The leaves of a nested dict by their paths joined by dots."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flattened(value).items()}
        else:
            flat[name] = np.asarray(value)
    return flat


def unstacked_names(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is stacked along a leading L under `h`, a layer each (`h_0`, ...); the rest as it is."""
    flat: dict[str, np.ndarray] = {}
    for name, value in named.items():
        first, _, rest = name.partition(".")
        if first == _STACKED and value.ndim:
            flat |= {f"{_STACKED}_{layer}.{rest}": part for layer, part in enumerate(value)}
        else:
            flat[name] = value
    return flat
