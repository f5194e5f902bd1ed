"""The one table of devices: what a chip can do, by its makers' data sheets."""

import re
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

_GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: what people call it.
        kinds: words of jax's `device_kind` that tell it.
        peak_flops: dense 16-bit products with 32-bit sums, FLOP/s (bfloat16; float16 where it has no bfloat16).
        memory_bytes: of its own memory.
        memory_bandwidth: of that memory, bytes/s.
        link_bandwidth: of one link to another chip, one way, bytes/s; 0 where a chip has none of its own.
        links: how many of them.
        torus_dimensions: of the network that the links make; 0 for a switch that connects all with all.
        ring_multiple: a side of the torus is closed to a ring where it is a multiple of this; 0 for a switch.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float = 0.0
    links: int = 0
    torus_dimensions: int = 0
    ring_multiple: int = 0


# TPU: Google Cloud's pages of system architecture (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). They give the
# bandwidth between chips for all links of a chip and both ways: v5e 400 GB/s over 4 links, v6e 800 over 4, v5p 1,200
# over 6; v4 300 over 6 (N. Jouppi et al., ISCA 2023, table 4: 50 GB/s a link, both ways 100). Memory is in GiB there
# in fact, whatever the unit says. Sides are closed to rings in 4 × 4 × 4 cubes (v4, v5p), or a pod's 16 chips.
# NVIDIA: the data sheets of each product; of two figures for the tensor cores the one without sparsity; NVLink as
# one link of its whole bandwidth, one way.
# The first entry of which these words stand in `device_kind` counts: more words stand before fewer. Whole words: an RTX
# A1000 is no A100, and an L40 no L4.
DEVICES: tuple[Device, ...] = (
    Device("TPU v4", ("TPU v4",), 275e12, 32 * _GIB, 1200e9, 50e9, 6, 3, 4),
    Device("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 50e9, 4, 2, 16),
    Device("TPU v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 100e9, 6, 3, 4),
    Device("TPU v6e", ("TPU v6", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 100e9, 4, 2, 16),
    Device("NVIDIA GB200", ("GB200",), 2500e12, 186 * 10**9, 8000e9, 900e9, 1),
    Device("NVIDIA B200", ("B200",), 2250e12, 180 * 10**9, 7700e9, 900e9, 1),
    Device("NVIDIA H200", ("H200",), 989e12, 141 * 10**9, 4800e9, 450e9, 1),
    Device("NVIDIA GH200", ("GH200",), 989e12, 96 * 10**9, 4000e9, 450e9, 1),
    Device("NVIDIA H100 PCIe", ("H100 PCIe",), 756e12, 80 * 10**9, 2000e9),
    Device("NVIDIA H100 NVL", ("H100 NVL",), 835e12, 94 * 10**9, 3900e9, 300e9, 1),
    Device("NVIDIA H100", ("H100",), 989e12, 80 * 10**9, 3350e9, 450e9, 1),
    Device("NVIDIA A100 80GB", ("A100-SXM4-80GB", "A100-SXM-80GB"), 312e12, 80 * 10**9, 2039e9, 300e9, 1),
    Device("NVIDIA A100 80GB PCIe", ("A100 80GB PCIe",), 312e12, 80 * 10**9, 1935e9),
    Device("NVIDIA A100", ("A100",), 312e12, 40 * 10**9, 1555e9, 300e9, 1),
    Device("NVIDIA L40S", ("L40S",), 362e12, 48 * 10**9, 864e9),
    Device("NVIDIA L40", ("L40",), 181e12, 48 * 10**9, 864e9),
    Device("NVIDIA L4", ("L4",), 121e12, 24 * 10**9, 300e9),
    Device("NVIDIA V100", ("V100",), 125e12, 16 * 10**9, 900e9, 150e9, 1),
    Device("NVIDIA T4", ("T4",), 65e12, 16 * 10**9, 300e9),
)


def find_device(kind: str) -> Device | None:
    """The table's entry for a `device_kind`; None where it has none."""
    return next(
        (
            device
            for device in DEVICES
            if any(re.search(rf"\b{re.escape(words)}\b", kind) for words in device.kinds)
        ),
        None,
    )


def device_peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of one device: by the table, or for a CPU by timing a product of two 2,048-wide matrices.

    None where the device is not in the table: no utilisation is reported then, rather than a guess.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # All simulated devices share the machine.
        return _measured_flops(dtype) / jax.device_count()
    found = find_device(device.device_kind)
    return None if found is None else found.peak_flops


def _measured_flops(dtype: str, width: int = 2048, repeats: int = 5) -> float:
    matrix = jnp.ones((width, width), dtype)
    multiply = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    multiply(matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        multiply(matrix).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return 2 * width**3 / best
