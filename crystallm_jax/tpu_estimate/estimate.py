"""A compiled program for people, and for machines."""

from dataclasses import asdict
from typing import Any

from crystallm_jax.tpu_estimate.compile_ahead import Report
from crystallm_jax.tpu_estimate.roofline import ASSUMPTIONS

_GIB = 1024**3


def as_text(report: Report) -> str:
    """The report, line by line."""
    mesh = " × ".join(f"{name} {size}" for name, size in report.mesh.items())
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    chip = report.placed.chip
    lines = [
        f"{report.program} on {report.placed.name}: {report.devices} × {chip.name}, mesh {mesh}",
        f"compiled ahead of time in {report.compile_seconds:.0f} s ({versions}); {report.tokens:,} tokens a step",
        "",
        "of each device",
        *_memory_lines(report),
        *_cost_lines(report),
        "",
        *_traffic_lines(report),
        "",
        *_prediction_lines(report),
    ]
    return "\n".join(lines) + "\n"


def as_dict(report: Report) -> dict[str, Any]:
    """The report's figures, for JSON; units are bytes, seconds and FLOPs."""
    prediction = report.prediction
    return {
        "program": report.program,
        "topology": report.placed.name,
        "chip": report.placed.chip.name,
        "devices": report.devices,
        "mesh": report.mesh,
        "tokens": report.tokens,
        "memory": {**asdict(report.memory), "peak": report.memory.peak},
        "flops": {
            "model": report.model_flops / report.devices,
            "compiled": report.costs.flops,
            "bfloat16_passes": report.costs.passes,
            "kernels": report.costs.kernels,
            "kernels_uncounted": report.costs.kernels_unknown,
            "loops_counted_once": report.costs.unknown_loops,
        },
        "bytes_accessed": report.costs.bytes,
        "collectives": [asdict(one) for one in report.traffic],
        "prediction": {
            **asdict(prediction),
            "step_overlapped": prediction.overlapped,
            "step_serial": prediction.serial,
            "mfu_overlapped": report.utilisation(prediction.overlapped),
            "mfu_serial": report.utilisation(prediction.serial),
            "assumptions": list(ASSUMPTIONS),
        },
        "compile_seconds": round(report.compile_seconds, 1),
        "versions": report.versions,
    }


def _memory_lines(report: Report) -> list[str]:
    memory = report.memory
    return [
        f"  memory    arguments {_gib(memory.arguments)}, outputs besides {_gib(memory.outputs)}, temporaries"
        f" {_gib(memory.temporaries)}, code {_gib(memory.code)}",
        f"            at most {_gib(memory.peak)} of {_gib(memory.capacity)}"
        f" ({100 * memory.peak / memory.capacity:.0f} %): it fits",
    ]


def _cost_lines(report: Report) -> list[str]:
    costs, model = report.costs, report.model_flops / report.devices
    lines = [
        f"  FLOPs     {_short(costs.flops)} in the compiled program, {_short(model)} by the model's formula"
        f" ({costs.flops / model:.2f} times)"
    ]
    if costs.passes > costs.flops:
        lines.append(
            f"            {_short(costs.passes)} in bfloat16, of which float32 products take several each"
        )
    if costs.kernels_unknown:
        lines.append(f"            without {costs.kernels_unknown} kernels that do not say what they do")
    if costs.unknown_loops:
        lines.append(f"            {costs.unknown_loops} loops of unknown length count as one round")
    return [*lines, f"  traffic   {_gib(costs.bytes)} to and from the main memory"]


def _traffic_lines(report: Report) -> list[str]:
    if not report.traffic:
        return ["no communication"]
    lines = ["collectives    over          group    times  behind work         bytes  predicted"]
    for one in report.traffic:
        axes = "×".join(one.axes) or "-"
        lines.append(
            f"  {one.kind:<18} {axes:<12} {one.group:>3} {one.count:>8,} {one.overlapped:>12,}"
            f" {_size(one.bytes):>13} {_seconds(one.seconds):>10}"
        )
    return lines


def _prediction_lines(report: Report) -> list[str]:
    found, chip = report.prediction, report.placed.chip
    lines = [
        "prediction, not a measurement",
        f"  products {_seconds(found.compute)}, memory {_seconds(found.memory)}, communication"
        f" {_seconds(found.communication)}",
    ]
    for name, seconds in (
        ("communication hidden", found.overlapped),
        ("nothing of it hidden", found.serial),
    ):
        rate = report.tokens / seconds
        lines.append(
            f"  {name}: {_seconds(seconds)} a step, {rate:,.0f} tokens/s, MFU {100 * report.utilisation(seconds):.0f} %"
        )
    lines.append(
        f"  {chip.name}: {chip.peak_flops / 1e12:.0f} TFLOP/s, {chip.memory_bandwidth / 1e9:,.0f} GB/s of memory,"
        f" {chip.links} links of {chip.link_bandwidth / 1e9:.0f} GB/s each way"
    )
    return lines + [f"  assumed: {text}" for text in ASSUMPTIONS]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _size(size: float) -> str:
    for unit, scale in (("GiB", _GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:.0f} B"


def _short(number: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
