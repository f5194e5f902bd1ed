"""`metrics.jsonl`, the figures of a run: a line of JSON a logged step. It is read and written without JAX."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystallm_jax.errors import DataError
from crystallm_jax.files import new_file

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends a line of JSON a logged step to `metrics.jsonl`; after a resume, steps that are redone are cut off.

    Both raise DataError where the file cannot be written.

    Args:
        path: the file.
        first_step: lines of this step and later are dropped from what is there.

    Attributes:
        last: the newest line that was kept; empty without one.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        self.last: dict[str, Any] = {}
        with self._writing(), new_file(path) as partial, partial.open("w") as file:
            for line in read_metrics(path) if path.exists() else ():
                if line["step"] < first_step:
                    file.write(json.dumps(line) + "\n")
                    self.last = line

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


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for those that cannot be read: a kill, or a full disk, may cut one short.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = _parsed(text)
            if isinstance(line, dict) and type(line.get("step")) is int and _figures_only(line):
                yield line


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # Of a step that will be redone.
        return None


def _figures_only(line: dict[str, Any]) -> bool:
    """Whether a line holds what is written here, numbers and null."""
    return all(value is None or isinstance(value, int | float) for value in line.values())


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
