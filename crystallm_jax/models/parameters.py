"""Parameters by name, as files hold them, and as nested dicts, as the model takes them.

Published checkpoints have the names and shapes of `models.published_names`.

In our files a parameter is named by its path joined by dots (`h_0.attn.c_attn.kernel`) and is a matrix or a vector, as
`parameter_table` says. Read are also the layouts of training: layers stacked under `h`, and `c_attn` as three kernels
side by side ([D, 3, D]), which earlier versions kept as one ([D, 3 D]): the same numbers in the same order.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.published_names import ParameterEntry, parameter_table
from crystallm_jax.models.torch_file import StoredTensor, stored_bytes

_STACKED = "h"
FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What parameters may be stored as."""


def named_arrays(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters of an unrolled model by name, in the shapes of files."""
    named = flattened(params)
    return {
        name: named[name].reshape(entry.shape)
        for entry in parameter_table(config).values()
        for name in (".".join(entry.path),)
    }


def params_from_named(named: Mapping[str, np.ndarray], config: ModelConfig, *, place: str) -> dict[str, Any]:
    """Arrange named arrays into the nested float32 parameters of `GPT`.

    Args:
        named: by name; of a type that becomes float32.
        config: the shape of the model.
        place: where they come from, for the message.

    Raises:
        ModelError: one is missing, left over, of another shape than `config` asks for, of integers, or not finite.
    """
    for name, value in named.items():
        if name.startswith(f"{_STACKED}.") and value.shape[:1] != (config.n_layer,):
            raise ModelError(
                f"{place}: tensor {name} has shape {value.shape}; the configuration asks for {config.n_layer} layers"
            )
    remaining = unstacked_names(named)
    if config.n_layer > len(remaining):  # found out before a table of them is made
        raise ModelError(
            f"{place}: {len(remaining)} tensors are too few for the {config.n_layer} layers that are stated"
        )
    arranged = {}
    for entry in parameter_table(config).values():
        name = ".".join(entry.path)
        if name not in remaining:
            raise ModelError(f"{place}: tensor {name} is missing")
        value = parameter_value(remaining.pop(name), entry, what=f"{place}: tensor {name}")
        arranged[name] = value
    if remaining:
        raise ModelError(f"{place}: tensors that no parameter takes: {', '.join(sorted(remaining)[:5])}")
    return nested(arranged)


def parameter_value(value: np.ndarray, entry: ParameterEntry, *, what: str) -> np.ndarray:
    """One parameter as float32, in its shape in memory.

    Raises:
        ModelError: it is of another shape, of integers, or not finite.
    """
    if value.shape not in (entry.shape, entry.held):
        raise ModelError(f"{what} has shape {value.shape}; the configuration asks for {entry.shape}")
    if value.dtype.name not in FLOATS:
        raise ModelError(f"{what} is of {value.dtype}; only floating-point numbers are known")
    with np.errstate(over="ignore"):  # said below, in one line
        value = np.ascontiguousarray(value, np.float32).reshape(entry.held)
    if not np.isfinite(value).all():
        raise ModelError(f"{what} holds numbers that are not finite: get another copy")
    return value


def params_from_tensors(
    tensors: Mapping[str, Any], config: ModelConfig, *, place: str, role: str = "tensor"
) -> dict[str, Any]:
    """Read tensors under their published names into nested float32 arrays like the parameters of `GPT`.

    Every one is checked before the first is read; what is read takes the memory of what is returned, and of one tensor
    more.

    Args:
        tensors: `StoredTensor`s, those of the configuration and no others.
        config: the shape of the model.
        place: the file, for messages.
        role: what the tensors are, for messages.

    Raises:
        ModelError: one is missing, left over, of another shape or type, or has numbers that are not finite.
    """
    table = parameter_table(config)
    for name, entry in table.items():
        _check_tensor(tensors.get(name), entry, f"{place}: {role} {name}")
    if left := sorted(tensors.keys() - table.keys()):
        raise ModelError(f"{place}: {role}s that no parameter takes: {', '.join(left[:5])}")
    if sum(tensor.nbytes for tensor in tensors.values()) > stored_bytes(tensors.values()):
        raise ModelError(f"{place}: {role}s of different names share their numbers: get another copy")
    named = {}
    for name, entry in table.items():
        values = tensors[name].read()
        # Published numbers may be of a wider type.
        with np.errstate(over="ignore"):
            value = np.array(values.T if entry.transposed else values, np.float32, order="C")
        if not np.isfinite(value).all():
            raise ModelError(f"{place}: {role} {name} has numbers that are not finite: get another copy")
        named[".".join(entry.path)] = value.reshape(entry.held)
    return nested(named)


def published_arrays(params: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Nested arrays like the parameters of `GPT` under their published names: views in their published shapes."""
    named = named_arrays(params, config)
    for name, entry in parameter_table(config).items():
        value = named[".".join(entry.path)]
        yield name, value.T if entry.transposed else value


def flattened(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The leaves of a nested dict by their paths joined by dots."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flattened(value).items()}
        else:
            flat[name] = np.asarray(value)
    return flat


def nested(named: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays by name as nested dicts: `flattened` the other way round."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *before, last = name.split(".")
        inner = tree
        for part in before:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


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


def _check_tensor(tensor: Any, entry: ParameterEntry, what: str) -> None:
    if tensor is None:
        raise ModelError(f"{what} is missing")
    if not isinstance(tensor, StoredTensor):
        raise ModelError(f"{what} is no tensor")
    if tensor.shape != entry.published_shape:
        raise ModelError(
            f"{what} has shape {tensor.shape}; the configuration asks for {entry.published_shape}"
        )
    if tensor.dtype.kind != "f":
        raise ModelError(f"{what} is of {tensor.dtype}: only floating-point numbers are known")
