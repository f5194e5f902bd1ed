"""What training on slices of TPUs would take, by compiling for them ahead of time: a prediction, not a measurement.

    python benchmarks/tpu_scaling.py [--minutes 15] [--full] [--out benchmarks/results/tpu_scaling.json]

The training step of the small and the large model (bfloat16, no dropout, scanned layers, `remat: dots`) is compiled
for v5e, v5p and v6e slices and several meshes; `crystallm compile` says how its figures come about. A mesh is
compiled once with two micro-batches and counted for both kinds of scaling: weak (as many tokens a device and step on
every slice as four chips read of the published step) and strong (the published 1.31 M tokens a step, rows and
micro-batches arranged anew). A case that stands in the results already is not compiled again, so that the table can
be made in several sittings; --full compiles all meshes on all slices, which takes hours on a small machine.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.config import find_config, load_config
from crystallm_jax.files import new_file
from crystallm_jax.tpu_estimate.compile_ahead import (
    MemoryExceededError,
    Report,
    compile_training,
    with_micro_batches,
)
from crystallm_jax.tpu_estimate.estimate import as_dict
from crystallm_jax.tpu_estimate.roofline import ASSUMPTIONS
from crystallm_jax.tpu_estimate.topology import open_slice
from crystallm_jax.train_run.train_config import TrainConfig

_COMPILED = 2  # micro-batches; one would be no loop
_SETTINGS = ("dropout=0", "layers=scanned", "remat=dots", "dtype=bfloat16")


@dataclass(frozen=True)
class Case:
    """One compilation: `data` × `fsdp` × `tensor` of a slice, and rows of a micro-batch on each group of `tensor`."""

    model: str
    topology: str
    data: int
    fsdp: int
    tensor: int
    rows: int

    @property
    def key(self) -> str:
        """Under which its result is kept."""
        return f"{self.model} {self.topology} {self.data}x{self.fsdp}x{self.tensor} {self.rows}"

    @property
    def devices(self) -> int:
        """Chips of the slice."""
        return self.data * self.fsdp * self.tensor

    @property
    def mesh(self) -> str:
        """Its axes, those of one device left out."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        return " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


# The published step has 640 rows of 2,048 tokens (large) or 1,280 of 1,024 (small).
_STEP_ROWS = {"small": 1280, "large": 640}
# Rows of a micro-batch that divide the published step on so many chips, and fit.
_ROWS = {
    "small": {4: 20, 8: 20, 16: 20, 32: 20, 64: 20, 128: 10, 256: 5},
    "large": {4: 5, 8: 5, 16: 5, 32: 5, 64: 5, 128: 5, 256: 2},
}
_SLICES = {
    "v5e": {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {8: "2x2x2", 64: "4x4x4", 128: "4x4x8"},
    "v6e": {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
}


def _case(model: str, chip: str, devices: int, *, fsdp: int, tensor: int = 1) -> Case:
    rows = _ROWS[model][devices]
    return Case(
        model, f"{chip}:{_SLICES[chip][devices]}", devices // (fsdp * tensor), fsdp, tensor, rows * tensor
    )


def short_grid() -> list[Case]:
    """What tells most, the most telling first."""
    return [
        _case("large", "v5e", 64, fsdp=64),
        _case("large", "v5e", 64, fsdp=1),
        _case("large", "v5e", 64, fsdp=8),
        _case("large", "v5e", 64, fsdp=32, tensor=2),
        _case("large", "v5e", 256, fsdp=256),
        _case("small", "v5e", 64, fsdp=1),
        _case("large", "v5e", 4, fsdp=4),
        _case("large", "v6e", 64, fsdp=64),
        _case("large", "v5p", 64, fsdp=64),
        _case("large", "v5e", 256, fsdp=16),
        _case("small", "v5e", 64, fsdp=64),
        _case("small", "v5e", 256, fsdp=1),
        _case("large", "v6e", 256, fsdp=256),
        _case("large", "v5p", 128, fsdp=128),
    ]


def full_grid() -> Iterator[Case]:
    """Every mesh on every slice, after the short grid."""
    short = short_grid()
    yield from short
    for model in ("large", "small"):
        for chip, slices in _SLICES.items():
            for devices in slices:
                side = {4: 2, 8: 2, 16: 4, 32: 8, 64: 8, 128: 16, 256: 16}[devices]
                for fsdp, tensor in ((1, 1), (devices, 1), (side, 1), (devices // 2, 2), (side, 2)):
                    case = _case(model, chip, devices, fsdp=fsdp, tensor=tensor)
                    if case.data >= 1 and case not in short:
                        yield case


def measure(case: Case) -> dict[str, Any]:
    """Compile a case and count it for both kinds of scaling."""
    base = load_config(TrainConfig, find_config(case.model), _SETTINGS)
    config = replace(
        base,
        data_parallel=case.data,
        fsdp=case.fsdp,
        tensor=case.tensor,
        batch_size=case.rows * case.data * case.fsdp,
        gradient_accumulation_steps=_COMPILED,
    )
    found: dict[str, Any] = {"model": case.model, "topology": case.topology, "devices": case.devices}
    found |= {"mesh": case.mesh, "rows": case.rows}
    try:
        report = compile_training(config, CIFTokenizer().vocab_size, open_slice(case.topology))
    except MemoryExceededError as error:
        return {**found, "error": str(error)}
    step = _STEP_ROWS[case.model]
    counts = {
        "weak": max(1, step // 4 // (case.rows // case.tensor)),
        "strong": max(1, round(step / config.batch_size)),
    }
    kinds = {kind: _figures(with_micro_batches(report, _COMPILED, n), n) for kind, n in counts.items()}
    return {**found, **kinds, "compiled": as_dict(report)}


def _figures(report: Report, micro_batches: int) -> dict[str, Any]:
    seconds = report.prediction
    return {
        "micro_batches": micro_batches,
        "tokens": report.tokens,
        "compute_s": seconds.compute,
        "memory_s": seconds.memory,
        "communication_s": seconds.communication,
        "step_s": [seconds.overlapped, seconds.serial],
        "mfu": [report.utilisation(seconds.overlapped), report.utilisation(seconds.serial)],
        "tokens_per_s": [report.tokens / seconds.overlapped, report.tokens / seconds.serial],
    }


def table(cases: dict[str, Any]) -> str:
    """The results, a line a case and kind of scaling."""
    header = (
        f"{'model':<6} {'slice':<10} {'mesh':<22} {'rows':>5} {'micro':>5} {'M tokens':>8} {'memory':>8}"
        f" {'products':>9} {'HBM':>8} {'comm.':>8} {'step':>15} {'MFU %':>9} {'M tokens/s':>13}"
    )
    lines = []
    for kind in ("strong", "weak"):
        lines += [f"{kind} scaling", header]
        for found in sorted(
            cases.values(), key=lambda c: (c["model"], c["topology"][:3], c["devices"], c["mesh"])
        ):
            name = f"{found['model']:<6} {found['topology']:<10} {found['mesh']:<22} {found['rows']:>5}"
            if "error" in found:
                lines.append(f"{name} {found['error']}")
                continue
            one = found[kind]
            low, high = one["step_s"]
            lines.append(
                f"{name} {one['micro_batches']:>5} {one['tokens'] / 1e6:>8.2f}"
                f" {found['compiled']['memory']['peak'] / 2**30:>4.1f} GiB"
                f" {_ms(one['compute_s']):>9} {_ms(one['memory_s']):>8} {_ms(one['communication_s']):>8}"
                f" {_ms(low):>6} to {_ms(high):>5} {100 * one['mfu'][1]:>3.0f} to {100 * one['mfu'][0]:>2.0f}"
                f" {one['tokens_per_s'][1] / 1e6:>5.2f} to {one['tokens_per_s'][0] / 1e6:>5.2f}"
            )
        lines.append("")
    return "\n".join(
        [*lines, "seconds in ms; step, MFU and tokens/s from communication wholly hidden to not at all"]
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.01 else f"{seconds * 1e3:.1f}"


def main() -> int:
    """Compile what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15, help="begin no further case after so many")
    parser.add_argument("--full", action="store_true", help="all meshes on all slices")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tpu_scaling.json"))
    settings = parser.parse_args()
    results: dict[str, Any] = {"cases": {}}
    if settings.out.is_file():
        results = json.loads(settings.out.read_text(encoding="utf-8"))
    begun = time.monotonic()
    for case in list(full_grid()) if settings.full else short_grid():
        if case.key in results["cases"]:
            continue
        if time.monotonic() - begun > 60 * settings.minutes:
            print(f"{settings.minutes:g} minutes are over; the same command goes on", file=sys.stderr)
            break
        since = time.monotonic()
        results["cases"][case.key] = measure(case)
        print(f"{case.key}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
        results |= {
            "what": "predictions from steps compiled ahead of time; no TPU was used",
            "settings": list(_SETTINGS),
            "assumptions": list(ASSUMPTIONS),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        }
        with new_file(settings.out) as partial:
            partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(results["cases"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
