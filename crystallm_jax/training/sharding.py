"""Where arrays live: a device mesh, and rules from parameter paths to the axes they are split over.

The model knows nothing of this. A parameter's path (`h_0/attn/c_attn/kernel`) must match exactly one rule; the
optimiser's moments carry the same paths and so the same sharding.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crystallm_jax.errors import ConfigError
from crystallm_jax.model.axes import BATCH_AXES, DATA, FSDP, TENSOR
from crystallm_jax.model.stacking import STACKED

# Kernels are split over `fsdp` along the side that is the residual stream, and over `tensor` along the other: heads, or
# hidden units of the MLP. What is small stays whole on every device: embeddings (1 % of the large model; a lookup in
# a split table would be gathered whole anyway) and vectors. Specs are those of one layer; stacked parameters (`h`)
# have a leading L, which is not split.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(wte|wpe)/embedding", PartitionSpec()),
    (r"h(_\d+)?/attn/c_attn/kernel", PartitionSpec(FSDP, None, TENSOR)),
    (r"h(_\d+)?/mlp/c_fc/kernel", PartitionSpec(FSDP, TENSOR)),
    (r"h(_\d+)?/(attn|mlp)/c_proj/kernel", PartitionSpec(TENSOR, FSDP)),
    (r"(h(_\d+)?/ln_[12]|ln_f)/(scale|bias)", PartitionSpec()),
    (r"h(_\d+)?/attn/c_attn/bias", PartitionSpec(None, TENSOR)),
    (r"h(_\d+)?/mlp/c_fc/bias", PartitionSpec(TENSOR)),
    (r"h(_\d+)?/(attn|mlp)/c_proj/bias", PartitionSpec()),
)

MICRO_BATCHES = PartitionSpec(None, BATCH_AXES, None)
BATCH = PartitionSpec(BATCH_AXES, None)


def make_mesh(
    data_parallel: int, fsdp: int, devices: Sequence[jax.Device] | None = None, *, tensor: int = 1
) -> Mesh:
    """A `data` × `fsdp` × `tensor` mesh over the devices given (all by default).

    Raises:
        ConfigError: the axes do not multiply to the number of devices, or do not fit into a slice of several.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    for name, size in (("fsdp", fsdp), ("tensor", tensor)):
        if size < 1 or count % size:
            raise ConfigError(f"{name}={size} does not divide the {count} devices")
    data = count // (fsdp * tensor) if data_parallel == -1 else data_parallel
    if data * fsdp * tensor != count:
        raise ConfigError(
            f"data_parallel={data_parallel} × fsdp={fsdp} × tensor={tensor} is not the number of devices, {count}"
        )
    shape = (data, fsdp, tensor)
    # But on TPUs, neighbours in the list talk fastest: the tensor axis, which talks most, is the innermost.
    grid = _torus_grid(shape, devices) if devices[0].platform == "tpu" else np.asarray(devices).reshape(shape)
    # Auto axes: Linen's modules do not state shardings, the compiler derives them (jax would default to Explicit).
    return Mesh(grid, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def _torus_grid(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Axes of the mesh on axes of the torus, so that neighbours in the one are neighbours in the other.

    Several slices are joined by a slower network: only the data axis, which talks least, goes over it.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    if data % slices:
        raise ConfigError(
            f"fsdp={fsdp} × tensor={tensor} does not divide the {len(devices) // slices} devices of each of the"
            f" {slices} TPU slices, between which only the data axis may run"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as text: `h_0/attn/c_attn/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def match_rule(name: str, rules: Sequence[tuple[str, Any]]) -> Any:
    """What the one rule that matches a parameter's path gives.

    Raises:
        ValueError: no rule or several match: the table and the model have drifted apart.
    """
    found = [value for pattern, value in rules if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"parameter {name} matches {len(found)} rules; it must match exactly one")
    return found[0]


def parameter_spec(name: str) -> PartitionSpec:
    """The partition of the parameter of this path."""
    spec = match_rule(name, PARAMETER_RULES)
    return PartitionSpec(None, *spec) if name.startswith(f"{STACKED}/") and len(spec) else spec


def parameter_specs(params: Any) -> Any:
    """The partition of every parameter, a tree like `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: parameter_spec(path_name(path)), params)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a whole training state: parameters by the rules, the moments as their parameters, the rest whole.

    Raises:
        ConfigError: a dimension that is to be split does not divide by the mesh axis.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        inner = re.search(r"(?:^|/)((?:wte|wpe|h|h_\d+|ln_f)/.*)$", name)
        spec = parameter_spec(inner.group(1)) if inner else PartitionSpec()
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"{axis}={mesh.shape[axis]} does not divide the {size} of {name}; choose n_embd as a multiple"
                    " of it"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def check_heads(n_head: int, mesh: Mesh) -> None:
    """Refuse heads that cannot be split evenly over the mesh."""
    if n_head % mesh.shape[TENSOR]:
        raise ConfigError(f"tensor={mesh.shape[TENSOR]} does not divide the {n_head} heads")


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Refuse a micro-batch that cannot be split evenly over the mesh."""
    shards = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % shards:
        raise ConfigError(
            f"batch_size={batch_size} is not a multiple of the {shards} devices it is split over"
        )
