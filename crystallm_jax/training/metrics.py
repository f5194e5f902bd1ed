"""What a run reports: `metrics.jsonl`, and the rates that stand in it."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from crystallm_jax.errors import DataError

# Dense 16-bit peak of one device in FLOP/s, from the vendors' data sheets, by a part of `device_kind`.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def device_peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of one device: by the table, or for a CPU by timing a product of two 2,048-wide matrices.

    None where the device is not in the table: no utilisation is reported then, rather than a guess.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # All simulated devices share the machine.
        return _measured_flops(dtype) / jax.device_count()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device.device_kind), None)


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


class MetricsLog:
    """Appends a line of JSON a logged step to `metrics.jsonl`; after a resume, steps that are redone are cut off.

    Both raise DataError where the file cannot be written.

    Args:
        path: the file.
        first_step: lines of this step and later are dropped from what is there.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < first_step]
        partial = path.with_suffix(".partial")
        with self._writing():
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)

    def write(self, **values: Any) -> None:
        """Append one line; numbers that are not finite are written as null, which JSON knows."""
        with self._writing(), self._path.open("a") as file:
            finite = {key: value if _is_finite(value) else None for key, value in values.items()}
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._path}: cannot be written ({error.strerror}); make room and go on with init_from=resume"
            ) from None


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        # A line that a kill cut short belongs to a step that will be redone.
        return float("inf")
