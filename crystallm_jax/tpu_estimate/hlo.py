"""The compiler's text of a program (HLO), as far as counting needs it: computations, instructions, shapes."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_PARENTHESIS = re.compile(r"[()]")


class Shape(NamedTuple):
    """One array.

    Attributes:
        dtype: as HLO writes it, `bf16`.
        sizes: of its dimensions.
        space: the memory it lies in: 0 is the chip's main memory, 1 what lies beside the cores.
    """

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 0
        return math.prod(self.sizes) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        opcode: `dot`, `fusion`, `all-gather-start`, ...
        shapes: the arrays of its result, one unless it is a tuple (flattened).
        operands: names in the same computation.
        attributes: the rest of the line.
        arguments: what stands between its parentheses.
        is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    is_root: bool

    def called(self, attribute: str) -> tuple[str, ...]:
        """Computations that an attribute names (`calls`, `body`, `branch_computations`); none if it is not there."""
        found = re.search(rf"\b{attribute}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
        if found is None:
            return ()
        return (found[1],) if found[1] else tuple(_NAME.findall(found[2]))

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The integers of an attribute such as `lhs_contracting_dims={1,2}`; none if it is not there."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    def text(self, attribute: str) -> str:
        """An attribute without blanks, such as `dim_labels`; empty if it is not there."""
        found = re.search(rf"\b{attribute}=([^\s,]+)", self.attributes)
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        """How often a `while` runs, where the compiler knows it."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def channel(self) -> str:
        """What tells a collective from others, wherever pieces of it stand; empty where it has none."""
        found = re.search(r"\bchannel_id=(\d+)", self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The one whose result is the computation's."""
        return next(
            (item for item in self.instructions.values() if item.is_root),
            next(reversed(self.instructions.values())),
        )

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """The results of an instruction's operands."""
        return [self.instructions[name].shapes for name in instruction.operands if name in self.instructions]


class Module(NamedTuple):
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


def parse_module(text: str) -> Module:
    """Read the text of a compiled program.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and " -> " in line:
                current = {}
                computations[header[2]] = Computation(header[2], current)
                entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            # Alone on its line: what a kernel says of itself may go over several, one of which begins so.
            current = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
    begin = _INSTRUCTION.match(line)
    if begin is None:
        return None
    start = begin.end()
    shape_end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", shape_end)
    closing = _closing(line, opening)
    arguments = line[opening + 1 : closing - 1]
    return Instruction(
        name=begin[2],
        opcode=line[shape_end:opening].strip(),
        shapes=parse_shapes(line[start:shape_end]),
        operands=tuple(_NAME.findall(arguments)),
        attributes=line[closing:],
        arguments=arguments,
        is_root=begin[1] is not None,
    )


def _closing(line: str, opening: int) -> int:
    """The place behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Every array in a type, tuples flattened: `(f32[2,3]{1,0}, s32[])` gives two."""
    shapes = []
    for dtype, sizes, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        dims = tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        shapes.append(Shape(dtype, dims, int(space[1]) if space else 0))
    return tuple(shapes)
