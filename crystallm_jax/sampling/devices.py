"""Where engines run: each on a device of its own, or on several that split its weights and its pages by heads."""

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from crystallm_jax.errors import SamplingError
from crystallm_jax.model.axes import TENSOR
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.model.inference import Affine, LayerWeights, Weights
from crystallm_jax.processes import usable_cores

# Devices that a CPU's cores are at most. With two on two cores all of a step runs on both, not its matrix products
# alone: 1.2 to 1.5 times as fast (measured). Of more cores each has several for its products; not measured.
_CPU_DEVICES = 2
# With fewer rows each (measured: four) two are slower than one, for a step of few rows takes hardly less than one of
# twice as many.
_WORTH_A_DEVICE = 8


def use_all_cores(rows: int) -> None:
    """Let a CPU be two devices, each with an engine of its own, unless the user has said how many or jax has looked.

    Args:
        rows: that are decoded together at most; few are left to one device.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if rows >= _CPU_DEVICES * _WORTH_A_DEVICE and not said and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with suppress(RuntimeError):  # jax has looked
            jax.config.update("jax_num_cpu_devices", min(usable_cores(), _CPU_DEVICES))


@dataclass(frozen=True)
class Placement:
    """Where the arrays of one engine lie.

    Each device has some of the heads: their keys and values, and the part of the weights that makes and reads them. Of
    the MLP it has some of the hidden units. What the others need of it they get as sums of activations, twice a layer.
    All else is whole on every device.

    Attributes:
        devices: their number divides the heads.
    """

    devices: tuple[jax.Device, ...]

    @property
    def platform(self) -> str:
        """`cpu`, `gpu`, ..."""
        return self.devices[0].platform

    @property
    def whole(self) -> Sharding:
        """Of what every device has."""
        return self._split()

    @property
    def by_heads(self) -> Sharding:
        """Of pages and logs, whose second axis is H."""
        return self._split(None, TENSOR)

    def weights(self, weights: Weights) -> Weights:
        """The weights where they belong."""
        return jax.device_put(weights, self.weight_shardings(weights))

    def made_by_heads(self, make: Callable[..., Any], *arguments: Hashable) -> Any:
        """What the function makes of the arguments, made where it belongs."""
        numbers = tuple(range(len(arguments)))
        return jax.jit(make, static_argnums=numbers, out_shardings=self.by_heads)(*arguments)

    def weight_shardings(self, weights: Weights) -> Weights:
        """Where each belongs."""
        first, second = self._split(TENSOR), self._split(None, TENSOR)

        def affine(of: Affine, kernel: Sharding, bias: Sharding) -> Affine:
            return Affine(kernel, None if of.bias is None else bias)  # type: ignore[arg-type]

        def layer(of: LayerWeights) -> LayerWeights:
            return LayerWeights(
                ln_1=affine(of.ln_1, self.whole, self.whole),
                attention_in=affine(of.attention_in, second, second),
                attention_out=affine(of.attention_out, second, self.whole),
                ln_2=affine(of.ln_2, self.whole, self.whole),
                mlp_in=affine(of.mlp_in, first, first),
                mlp_out=affine(of.mlp_out, second, self.whole),
            )

        return Weights(
            wte=self.whole,  # type: ignore[arg-type]
            wpe=self.whole,  # type: ignore[arg-type]
            layers=tuple(map(layer, weights.layers)),
            ln_f=affine(weights.ln_f, self.whole, self.whole),
        )

    def _split(self, *axes: str | None) -> Sharding:
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        mesh = Mesh(np.array(self.devices), (TENSOR,), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec(*axes))


def placements(
    config: ModelConfig, tensor: int, devices: Sequence[jax.Device] | None = None
) -> list[Placement]:
    """One for each replica of the model: `tensor` devices each, of those given (this process's own by default).

    Raises:
        SamplingError: `tensor` does not divide the devices or the heads.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    for count, what in ((len(devices), "devices of this process"), (config.n_head, "heads of the model")):
        if count % tensor:
            raise SamplingError(f"tensor={tensor}: does not divide the {count} {what}; give a divisor of it")
    return [Placement(tuple(devices[first : first + tensor])) for first in range(0, len(devices), tensor)]
