"""A step time predicted from what a program does and what the chip can do. It is a bound, not a measurement.

The compute time assumes products at the data sheet's peak and memory at its full bandwidth, the two overlapping; the
communication time assumes every link at full bandwidth. Real steps are slower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crystallm_jax.tpu_estimate.count import Collective, Costs
from crystallm_jax.tpu_estimate.topology import Slice

# Of a message over one link (J. Austin et al., How to Scale Your Model, 2025: about a microsecond).
HOP_SECONDS = 1e-6

ASSUMPTIONS = (
    "products run at the data sheet's dense bfloat16 peak (a float32 product as the several bfloat16 ones that it"
    " takes), memory and links at full bandwidth; element-wise arithmetic, and products that the compiler made"
    " element-wise (those of one token with a cache), are free",
    "memory traffic is what fusions read and write of the main memory, tile padding left out",
    "all-gather and reduce-scatter move (n - 1) / n of the whole over the links of a group, all-reduce twice that,"
    " all-to-all a quarter of the group's data over its longest side; a ring's links carry both ways, a line's one;"
    " groups that interleave on a side share its links; one microsecond a hop",
    "the two times are communication wholly behind the arithmetic, and none of it behind",
    "MFU is by the model's formula, which counts the scores that the causal mask hides: a kernel that skips them can"
    " come out above what the products alone allow",
)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step on each device.

    Attributes:
        compute: of products.
        memory: of traffic to the main memory.
        communication: of all collectives, one after the other.
        overlapped: of a step whose communication hides wholly.
        serial: of a step whose communication hides not at all.
    """

    compute: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.communication)

    @property
    def serial(self) -> float:
        """Communication added to the longer of the other two."""
        return max(self.compute, self.memory) + self.communication


def predict(costs: Costs, placed: Slice, positions: Sequence[int]) -> Prediction:
    """Predict a program on a slice.

    Args:
        costs: of the program.
        placed: the slice.
        positions: for each position in the mesh, the number of its device in the slice.
    """
    coordinates = [placed.coordinates[device] for device in positions]
    return Prediction(
        compute=costs.passes / placed.chip.peak_flops,
        memory=costs.bytes / placed.chip.memory_bandwidth,
        communication=sum(
            found.times * collective_seconds(found, placed, coordinates) for found in costs.collectives
        ),
    )


def collective_seconds(found: Collective, placed: Slice, coordinates: Sequence[tuple[int, ...]]) -> float:
    """Seconds of one run of a collective; the slowest of its groups counts.

    Args:
        found: the collective.
        placed: the slice that it runs on.
        coordinates: in the torus, of each position in the mesh.
    """
    # Groups are alike but for where they stand: the same shape is worked out once.
    shapes = {_group_shape([coordinates[member] for member in group]) for group in found.groups}
    return max((_group_seconds(found, placed, shape) for shape in shapes), default=0.0)


# For each side of the torus: how many places of it the group stands on, and the distance between two.
_GroupShape = tuple[tuple[tuple[int, int], ...], int]


def _group_shape(members: list[tuple[int, ...]]) -> _GroupShape:
    sides = []
    for places in zip(*members, strict=True):
        distinct = sorted(set(places))
        span = distinct[-1] - distinct[0]
        sides.append((len(distinct), max(1, round(span / max(1, len(distinct) - 1)))))
    return tuple(sides), len(members)


def _group_seconds(found: Collective, placed: Slice, shape: _GroupShape) -> float:
    sides, count = shape
    link = placed.chip.link_bandwidth
    if count < 2 or link == 0:
        return 0.0
    # Of each side that the group spans: how many links' worth of bandwidth it has there, and how long a way.
    lanes, hops, longest = 0.0, 0, 1
    for (places, stride), side, ring in zip(sides, placed.sides, placed.rings, strict=True):
        if places < 2:
            continue
        closed = ring and places * stride == side
        lanes += (2 if closed else 1) / stride
        hops += places * stride // 2 if closed else (places - 1) * stride
        longest = max(longest, places)
    if math.prod(places for places, _ in sides) != count:
        lanes = min(lanes, 1.0)  # no box of the torus: one link is all that is sure
    latency = hops * HOP_SECONDS
    share = (count - 1) / count
    moved = {
        "all-gather": share * found.bytes,
        "reduce-scatter": share * found.bytes,
        "all-reduce": 2 * share * found.bytes,
        "all-to-all": longest * found.bytes / 4,
        "collective-permute": found.bytes,
    }[found.kind]
    if found.kind == "collective-permute":
        return moved / link + latency
    return moved / (link * lanes) + latency * (2 if found.kind == "all-reduce" else 1)
