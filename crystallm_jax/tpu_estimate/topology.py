"""A slice of TPUs that is not at hand: its devices, their chip, and the network between them."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from crystallm_jax.errors import ConfigError
from crystallm_jax.training.chips import DEVICES, Device, find_device

_NAME = re.compile(r"([a-z0-9]+):(\d+(?:x\d+){1,2})")
# What the compiler's library asks of the machine that it believes to be on; any answer will do.
_ANSWERS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Nothing is run: compilations beside each other, and beside a program that runs on real chips, do no harm.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Slice:
    """Chips of one kind and their network.

    Attributes:
        name: `v5e:16x16`.
        chip: of the table of devices.
        devices: one a chip, for compiling only.
        coordinates: of each device in the torus.
        sides: of the torus, in chips.
        rings: for each side, whether its ends are connected.
    """

    name: str
    chip: Device
    devices: tuple[jax.Device, ...]
    coordinates: tuple[tuple[int, ...], ...]
    sides: tuple[int, ...]
    rings: tuple[bool, ...]


def open_slice(name: str) -> Slice:
    """The slice of this name, such as `v5e:2x2`, `v6e:16x16` or `v5p:4x4x8`, described by libtpu.

    Raises:
        ConfigError: libtpu is not installed, or there is no such slice.
    """
    if find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for TPUs needs libtpu, which is not installed: pip install 'crystallm-jax[tpu]' (Linux)"
        )
    known = [device.name.removeprefix("TPU ") for device in DEVICES if device.torus_dimensions]
    wanted = _NAME.fullmatch(name)
    if wanted is None or wanted[1] not in known:
        raise ConfigError(
            f"topology {name!r} is not one of {', '.join(known)} and its shape, as in v5e:16x16 or v5p:4x4x8"
        )
    sides = tuple(int(side) for side in wanted[2].split("x"))
    dimensions = next(d.torus_dimensions for d in DEVICES if d.name == f"TPU {wanted[1]}")
    if len(sides) != dimensions:
        raise ConfigError(f"topology {name}: a {wanted[1]} slice has {dimensions} sides, not {len(sides)}")
    devices = _describe(name, wanted[1], sides)
    chip = find_device(devices[0].device_kind)
    if chip is None or len(devices) != math.prod(sides):
        raise ConfigError(f"topology {name}: libtpu makes {len(devices)} × {devices[0].device_kind} of it")
    return Slice(name, chip, devices, coordinates_of(devices, len(sides)), sides, closed_sides(chip, sides))


def closed_sides(chip: Device, sides: Sequence[int]) -> tuple[bool, ...]:
    """Which sides are rings: in a 2-D torus each for itself, in a 3-D one all or none (they are built of cubes)."""
    whole = [side % chip.ring_multiple == 0 for side in sides]
    return tuple(whole) if chip.torus_dimensions == 2 else (all(whole),) * len(sides)


def coordinates_of(devices: Sequence[jax.Device], dimensions: int) -> tuple[tuple[int, ...], ...]:
    """Where devices stand in the torus."""
    return tuple(tuple(device.coords)[:dimensions] for device in devices)


def _describe(name: str, generation: str, sides: tuple[int, ...]) -> tuple[jax.Device, ...]:
    for key, value in _ANSWERS.items():
        os.environ.setdefault(key, value)
    options: dict[str, object] = {}
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":
        # Its two cores are one device in training, as they are on the other chips.
        options["chip_config_name"] = "megacore"
    try:
        return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"topology {name}: libtpu knows no such slice ({reason})") from None
