"""What a compiled program does, counted by walking it: products, memory traffic, communication.

The compiler's own analysis counts the body of a loop once; here it counts as often as it runs. What is inside a
fusion costs its arithmetic; memory is touched where fusions begin and end.
"""

import math
import re
from dataclasses import dataclass, field, replace

from crystallm_jax.tpu_estimate.groups import Groups, parse_groups
from crystallm_jax.tpu_estimate.hlo import Computation, Instruction, Module, Shape
from crystallm_jax.tpu_estimate.loops import Scope, trip_count

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A float32 product is made of bfloat16 ones on a TPU: so many at each precision (jax.lax.Precision).
_PASSES = {"highest": 6, "high": 3}
# Results that are names for memory that others wrote.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_KERNEL_TARGET = "tpu_custom_call"
# Matrix products in the kernels of attention (jax's splash attention), by the name that they give their call:
# scores and values forwards; scores, their gradient and that of what each kernel is for backwards.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of COLLECTIVES.
        bytes: of the whole array that the group holds together (all-gather, reduce-scatter), or of each device's own.
        groups: of positions in the mesh; pairs of source and target for a permutation.
        times: how often it runs.
        overlapped: whether the compiler started it before other work and waits for it after.
    """

    kind: str
    bytes: int
    groups: Groups
    times: int
    overlapped: bool


@dataclass
class Costs:
    """Sums over one run of a program on one device.

    Attributes:
        flops: of products and convolutions.
        passes: the same, float32 products counted by the bfloat16 ones that they take.
        bytes: read from and written to the chip's main memory.
        kernels: hand-written kernels whose FLOPs are known by formula.
        kernels_unknown: those whose are not.
        unknown_loops: loops whose number of rounds the compiler does not know, counted once.
        collectives: each once, in the order of the program.
    """

    flops: float = 0.0
    passes: float = 0.0
    bytes: float = 0.0
    kernels: int = 0
    kernels_unknown: int = 0
    unknown_loops: int = 0
    collectives: list[Collective] = field(default_factory=list)


def count_costs(module: Module, devices: int, *, outer_rounds: int | None = None) -> Costs:
    """Count a program.

    Args:
        module: the program.
        devices: on which it runs.
        outer_rounds: of the loops that stand in no other one, in place of what was compiled: a training step's
            micro-batches.
    """
    walk = _Walk(module, devices, outer_rounds)
    walk.enter(Scope(module.computations[module.entry]), 1, fused=False)
    return walk.costs


def count_round(module: Module, devices: int) -> Costs:
    """Count one round of a program's outer loop, without what is done once before and after it."""
    one, two = (count_costs(module, devices, outer_rounds=rounds) for rounds in (1, 2))
    return replace(
        one,
        flops=two.flops - one.flops,
        passes=two.passes - one.passes,
        bytes=two.bytes - one.bytes,
        collectives=[
            replace(later, times=later.times - sooner.times)
            for sooner, later in zip(one.collectives, two.collectives, strict=True)
            if later.times > sooner.times
        ],
    )


class _Walk:
    """A pass over a module from its entry."""

    def __init__(self, module: Module, devices: int, outer_rounds: int | None) -> None:
        self.costs = Costs()
        self._outer_rounds = outer_rounds
        self._module = module
        self._devices = devices
        self._seen: set[tuple[str, str]] = set()

    def enter(self, scope: Scope, times: int, *, fused: bool) -> None:
        """Count the instructions of a computation that runs so often."""
        computation = scope.computation
        for instruction in computation.instructions.values():
            self._count_arithmetic(computation, instruction, times)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._count_collective(computation, instruction, times, kind)
            if not fused:
                self.costs.bytes += times * _traffic(self._module, computation, instruction)
            self._descend(scope, instruction, times, fused=fused)

    def _descend(self, scope: Scope, instruction: Instruction, times: int, *, fused: bool) -> None:
        opcode, computations = instruction.opcode, self._module.computations
        if opcode == "while":
            trips = trip_count(self._module, scope, instruction)
            if scope.outside is None and self._outer_rounds is not None:
                trips = self._outer_rounds
            self.costs.unknown_loops += trips is None
            rounds = times * (1 if trips is None else trips)
            for name in instruction.called("body"):
                self.enter(Scope(computations[name], instruction, scope), rounds, fused=fused)
        elif opcode == "conditional":
            branches = instruction.called("branch_computations") or (
                *instruction.called("true_computation"),
                *instruction.called("false_computation"),
            )
            # One of them runs: the one with the most text stands for the costliest.
            largest = max(branches, key=lambda name: len(computations[name].instructions))
            self.enter(Scope(computations[largest], None, scope), times, fused=fused)
        elif opcode in {"fusion", "call", "async-start"}:
            for name in instruction.called("calls") or instruction.called("to_apply"):
                self.enter(Scope(computations[name], None, scope), times, fused=fused or opcode == "fusion")

    def _count_arithmetic(self, computation: Computation, instruction: Instruction, times: int) -> None:
        if instruction.opcode == "dot":
            flops = dot_flops(computation, instruction)
        elif instruction.opcode == "convolution":
            flops = convolution_flops(computation, instruction)
        elif instruction.opcode == "custom-call" and instruction.text("custom_call_target").strip('"') == (
            _KERNEL_TARGET
        ):
            estimate = kernel_flops(computation, instruction)
            self.costs.kernels += estimate is not None
            self.costs.kernels_unknown += estimate is None
            flops = 0.0 if estimate is None else estimate
        else:
            return
        self.costs.flops += times * flops
        self.costs.passes += times * flops * _passes(computation, instruction)

    def _count_collective(
        self, computation: Computation, instruction: Instruction, times: int, kind: str
    ) -> None:
        # The pieces of a collective that is spread over the work that hides it share its channel.
        mark = (kind, instruction.channel)
        if instruction.channel and mark in self._seen:
            return
        self._seen.add(mark)
        groups = parse_groups(instruction.attributes, self._devices)
        size = sum(shape.bytes for shapes in computation.operand_shapes(instruction) for shape in shapes)
        if kind == "all-gather":
            size *= len(groups[0])
        scattered = kind == "all-reduce" and "reduce-scatter" in computation.name
        overlapped = instruction.opcode.endswith("-start") or _spread(computation)
        self.costs.collectives.append(
            Collective("reduce-scatter" if scattered else kind, size, groups, times, overlapped)
        )


def _spread(computation: Computation) -> bool:
    """Whether a fused computation is a piece of a collective that runs beside other work, as TPUs have them."""
    return any(
        item.text("custom_call_target").startswith('"AsyncCollective')
        for item in computation.instructions.values()
        if item.opcode == "custom-call"
    )


def dot_flops(computation: Computation, instruction: Instruction) -> float:
    """Two for each product of a `dot`."""
    left = computation.operand_shapes(instruction)[0][0]
    summed = math.prod(left.sizes[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(instruction.shapes[0].sizes) * summed


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Two for each product of a `convolution` of values: neither padding nor the holes of a dilation count.

    On TPUs every matrix product becomes a convolution, batched ones with a window that only looks like one.
    """
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.text("dim_labels"))
    if labels is None:
        return 0.0
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    left, right = (shapes[0].sizes for shapes in computation.operand_shapes(instruction)[:2])
    result = instruction.shapes[0].sizes
    pairs = 1
    window = _window(instruction)
    for n in range(len(window["size"])):
        digit = str(n)
        pairs *= _valid_pairs(
            left[inputs.index(digit)],
            result[outputs.index(digit)],
            {name: values[n] for name, values in window.items()},
        )
    return 2.0 * pairs * result[outputs.index("b")] * result[outputs.index("f")] * right[kernel.index("i")]


def kernel_flops(computation: Computation, instruction: Instruction) -> float | None:
    """FLOPs of a hand-written kernel, by formula; None for one that is not known.

    Those of attention multiply blocks of queries and keys, of which the causal mask leaves those on and below the
    diagonal. The first operand has a place for each block, [1, rows, columns]; the first of four axes is [B, H, T, d].
    """
    products = next((n for name, n in _KERNEL_PRODUCTS.items() if instruction.name.startswith(name)), None)
    shapes = [found[0].sizes for found in computation.operand_shapes(instruction) if found]
    queries = next((sizes for sizes in shapes if len(sizes) == 4), None)
    if products is None or queries is None:
        return None
    rows = shapes[0][1] if len(shapes[0]) == 3 else 1
    rows_by_head, tokens, width = queries[0] * queries[1], queries[2], queries[3]
    return products * 2.0 * rows_by_head * tokens**2 * width * (rows + 1) / (2 * rows)


def _window(instruction: Instruction) -> dict[str, list[tuple[int, ...]]]:
    """`window={size=2x4 stride=2x4 pad=1_1x3_3 lhs_dilate=1x3}`, whole, a list a name."""
    found = re.search(r"\bwindow=\{([^}]*)\}", instruction.attributes)
    given = dict(part.split("=", 1) for part in found[1].split()) if found else {}
    count = len(given.get("size", "").split("x")) if given.get("size") else 0
    window: dict[str, list[tuple[int, ...]]] = {}
    for name, default in (("size", 1), ("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1)):
        text = given.get(name)
        window[name] = [(int(n),) for n in text.split("x")] if text else [(default,)] * count
    pad = given.get("pad")
    window["pad"] = (
        [tuple(int(n) for n in side.split("_")) for side in pad.split("x")] if pad else [(0, 0)] * count
    )
    return window


def _valid_pairs(size_in: int, size_out: int, window: dict[str, tuple[int, ...]]) -> int:
    """Pairs of an output's place and a place in the window that meet a value, along one dimension."""
    stride, low = window["stride"][0], window["pad"][0]
    hole, spread = window["lhs_dilate"][0], window["rhs_dilate"][0]
    end = (size_in - 1) * hole
    pairs = 0
    for place in range(window["size"][0]):
        # place * spread - low + out * stride must be a multiple of `hole` within [0, end].
        offset = place * spread - low
        first = max(0, -(-(0 - offset) // stride))
        last = min(size_out - 1, (end - offset) // stride)
        if hole == 1:
            pairs += max(0, last - first + 1)
        else:
            pairs += sum((offset + out * stride) % hole == 0 for out in range(first, last + 1))
    return pairs


def _passes(computation: Computation, instruction: Instruction) -> int:
    operands = [shapes[0].dtype for shapes in computation.operand_shapes(instruction) if shapes]
    if instruction.opcode == "custom-call" or "f32" not in operands:
        return 1
    found = re.search(r"operand_precision=\{([\w,]*)\}", instruction.attributes)
    return max((_PASSES.get(name, 1) for name in found[1].split(",")), default=1) if found else 1


def _main(shapes: tuple[Shape, ...]) -> int:
    """Bytes of those arrays that lie in the main memory."""
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads from and writes to the main memory."""
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0
    operands = computation.operand_shapes(instruction)
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return _fusion_traffic(inner, instruction, operands)
    read, written = sum(_main(shapes) for shapes in operands), _main(instruction.shapes)
    if opcode.endswith("-start"):
        written = 0
    elif opcode.endswith("-done"):
        read = 0
    elif opcode in _SLICES:
        read = written
    elif opcode == "dynamic-update-slice":
        read = written = _main(operands[1])
    return read + written


def _fusion_traffic(inner: Computation, instruction: Instruction, operands: list[tuple[Shape, ...]]) -> int:
    """Reads of a fusion's parameters, whole unless it takes slices of them, and writes of its results."""
    users: dict[str, list[Instruction]] = {}
    for item in inner.instructions.values():
        for name in item.operands:
            users.setdefault(name, []).append(item)
    total = 0
    for item in inner.instructions.values():
        if item.opcode != "parameter":
            continue
        number = int(item.arguments)
        size = _main(operands[number]) if number < len(operands) else 0
        total += min(size, sum(_read(user, item) for user in users.get(item.name, [])))
    root = inner.root
    results = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for shape, result in zip(instruction.shapes, results, strict=False):
        total += 0 if result.opcode == "parameter" else _written(inner, shape, result)
    return total


def _read(user: Instruction, parameter: Instruction) -> int:
    if user.opcode in _SLICES and user.operands[:1] == (parameter.name,):
        return sum(shape.bytes for shape in user.shapes)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
        return 0
    if user.opcode == "tuple" and user.is_root:
        return 0
    return sum(shape.bytes for shape in parameter.shapes)


def _written(inner: Computation, shape: Shape, result: Instruction) -> int:
    if shape.space != 0:
        return 0
    while result.opcode in {"bitcast", "copy"} and result.operands[0] in inner.instructions:
        result = inner.instructions[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return sum(part.bytes for part in inner.instructions[result.operands[1]].shapes)
    return shape.bytes
