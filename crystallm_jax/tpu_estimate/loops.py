"""How often a loop of a compiled program runs."""

from typing import NamedTuple

from crystallm_jax.tpu_estimate.hlo import Computation, Instruction, Module

# Instructions through which a value passes unchanged.
_SAME = {"copy", "bitcast", "convert", "opt-barrier", "copy-done", "copy-start"}


class Scope(NamedTuple):
    """Where an instruction stands: a computation, and for the body of a loop, that loop and where it stands."""

    computation: Computation
    loop: Instruction | None = None
    outside: "Scope | None" = None


def trip_count(module: Module, scope: Scope, loop: Instruction) -> int | None:
    """Rounds of a `while`: as the compiler notes it, or else of a counter that is compared with a constant.

    None where neither tells: a loop that ends when its values say so.

    Args:
        module: the program.
        scope: what the loop stands in.
        loop: the `while`.
    """
    if loop.trip_count is not None:
        return loop.trip_count
    condition = Scope(module.computations[loop.called("condition")[0]], loop, scope)
    body = Scope(module.computations[loop.called("body")[0]], loop, scope)
    test = condition.computation.root
    if test.opcode != "compare" or test.text("direction") != "LT":
        return None
    counter = _source(condition.computation, test.operands[0])
    if counter is None or counter.opcode != "get-tuple-element":
        return None
    place = int(counter.text("index"))
    last = _constant(condition, test.operands[1])
    first = _entering_constant(condition, place)
    step = _step(body, place)
    if last is None or first is None or step is None:
        return None
    return max(0, -(-(last - first) // step))


def _source(computation: Computation, name: str) -> Instruction | None:
    """The instruction whose value this is, behind copies."""
    found = computation.instructions.get(name)
    while found is not None and found.opcode in _SAME and found.operands:
        found = computation.instructions.get(found.operands[0])
    return found


def _constant(scope: Scope, name: str) -> int | None:
    """An integer that is written in the program, here or in what was brought into the loops around."""
    found = _source(scope.computation, name)
    if found is None:
        return None
    if found.opcode == "constant":
        text = found.arguments.strip()
        return int(text) if text.lstrip("-").isdigit() else None
    if found.opcode == "get-tuple-element":
        carried = _source(scope.computation, found.operands[0])
        if carried is not None and carried.opcode == "parameter":
            return _entering_constant(scope, int(found.text("index")))
    return None


def _entering_constant(scope: Scope, place: int) -> int | None:
    """What enters the loop around a scope at a place of its tuple."""
    if scope.loop is None or scope.outside is None:
        return None
    entering = _source(scope.outside.computation, scope.loop.operands[0])
    if entering is None or entering.opcode != "tuple":
        return None
    return _constant(scope.outside, entering.operands[place])


def _step(body: Scope, place: int) -> int | None:
    """What a round adds to the counter."""
    if body.computation.root.opcode != "tuple":
        return None
    added = _source(body.computation, body.computation.root.operands[place])
    if added is None or added.opcode != "add":
        return None
    for first, second in (added.operands, added.operands[::-1]):
        counter = _source(body.computation, first)
        # The other is the counter itself, which is no constant although a constant entered.
        if (
            counter is not None
            and counter.opcode == "get-tuple-element"
            and counter.text("index") == str(place)
        ):
            step = _constant(body, second)
            return step if step is not None and step > 0 else None
    return None
