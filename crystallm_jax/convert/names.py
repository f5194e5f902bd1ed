"""Published names of parameters, their shapes in files and in memory, and their order in the published optimiser.

Published linear weights are stored as [out, in]; ours as [in, out]. The output layer is the token embedding under a
second name.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.convert.torch_file import StoredTensor, stored_bytes
from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig


class ParameterEntry(NamedTuple):
    """Where a published tensor lives in our parameters.

    Attributes:
        path: of the parameter.
        shape: of it in our files, a matrix or vector.
        transposed: whether the published tensor is its transpose.
        held: its shape in memory, of the same elements in the same order.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    held: tuple[int, ...]

    @property
    def published_shape(self) -> tuple[int, ...]:
        """Shape of the published tensor."""
        return self.shape[::-1] if self.transposed else self.shape


def parameter_table(config: ModelConfig) -> dict[str, ParameterEntry]:
    """The published name of every parameter of a model."""
    D = config.n_embd
    table = {
        "transformer.wte.weight": ParameterEntry(
            ("wte", "embedding"), (config.vocab_size, D), transposed=False, held=(config.vocab_size, D)
        ),
        "transformer.wpe.weight": ParameterEntry(
            ("wpe", "embedding"), (config.block_size, D), transposed=False, held=(config.block_size, D)
        ),
    }

    def add(
        published: str, path: tuple[str, ...], shape: tuple[int, ...], held: tuple[int, ...] | None = None
    ) -> None:
        held = held or shape
        linear = len(shape) > 1
        table[f"{published}.weight"] = ParameterEntry(
            (*path, "kernel" if linear else "scale"), shape, linear, held
        )
        if config.bias:
            table[f"{published}.bias"] = ParameterEntry(
                (*path, "bias"), shape[-1:], transposed=False, held=held[1:] if linear else held
            )

    for layer in range(config.n_layer):
        published, ours = f"transformer.h.{layer}", f"h_{layer}"
        add(f"{published}.ln_1", (ours, "ln_1"), (D,))
        add(f"{published}.attn.c_attn", (ours, "attn", "c_attn"), (D, 3 * D), held=(D, 3, D))
        add(f"{published}.attn.c_proj", (ours, "attn", "c_proj"), (D, D))
        add(f"{published}.ln_2", (ours, "ln_2"), (D,))
        add(f"{published}.mlp.c_fc", (ours, "mlp", "c_fc"), (D, 4 * D))
        add(f"{published}.mlp.c_proj", (ours, "mlp", "c_proj"), (4 * D, D))
    add("transformer.ln_f", ("ln_f",), (D,))
    return table


class OptimizerOrder(NamedTuple):
    """Published names in the order in which the published optimiser numbers them: decayed ones first.

    Both are sorted as texts, layer 10 before layer 2.
    """

    decayed: tuple[str, ...]
    others: tuple[str, ...]


def optimizer_order(config: ModelConfig) -> OptimizerOrder:
    """The numbering of the published optimiser: weights of linear layers decay; the tied output layer does not."""
    table = sorted(parameter_table(config).items())
    return OptimizerOrder(
        tuple(name for name, entry in table if entry.transposed),
        tuple(name for name, entry in table if not entry.transposed),
    )


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
    params: dict[str, Any] = {}
    for name, entry in table.items():
        values = tensors[name].read()
        # Published numbers may be of a wider type.
        with np.errstate(over="ignore"):
            value = np.array(values.T if entry.transposed else values, np.float32, order="C")
        if not np.isfinite(value).all():
            raise ModelError(f"{place}: {role} {name} has numbers that are not finite: get another copy")
        inner = params
        for part in entry.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[entry.path[-1]] = value.reshape(entry.held)
    return params


def published_arrays(params: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Nested arrays like the parameters of `GPT` under their published names: views in their published shapes."""
    for name, entry in parameter_table(config).items():
        value: Any = params
        for part in entry.path:
            value = value[part]
        value = np.asarray(value).reshape(entry.shape)
        yield name, value.T if entry.transposed else value


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
