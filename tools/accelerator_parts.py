"""What comes back from a bare machine: a report, a run's figures, and weights in half precision in parts.

    report.json        checks, settings, where the training stands, the SHA-256 of each part
    metrics.jsonl.gz   a line every few steps, and one an evaluation
    weights-N.npz      parameters by name in float16: of each the low bytes and the high ones, uint8 [2, ...]

A part holds whole parameters, below 16 MiB together. Every file appears under its name when it is complete.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerator_shipment import byte_planes, from_byte_planes

from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.files import digest_of, new_file
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.model import Model
from crystallm_jax.models.parameters import flattened, named_arrays, params_from_named

FORMAT = 1
REPORT_FILE, METRICS_FILE = "report.json", "metrics.jsonl.gz"
# A little below what is allowed, for the names in a part; and of the files that may come back, those beside the parts,
# with room for one that is being written.
PART_BYTES = 15 * 2**20
MOST_PARTS = 5
_HALF = np.dtype("<f2")
# What is wrong with a part that is no longer what was written.
_DAMAGED = (OSError, ValueError, KeyError, EOFError)


class Returned(NamedTuple):
    """What came back: the weights, and all of the report."""

    weights: Model
    report: dict[str, Any]


def check_size(numbers: int) -> None:
    """Refuse a model of more parameters than can come back, before it is trained.

    Raises:
        ConfigError: it has more.
    """
    most = MOST_PARTS * PART_BYTES // _HALF.itemsize
    if numbers > most:
        raise ConfigError(
            f"the model has {numbers:,} parameters, {most:,} can come back: pack a smaller shape"
        )


@dataclass(frozen=True)
class Outbox:
    """The folder of what comes back.

    Attributes:
        folder: where it is.
        part_bytes: the most that a part has.
    """

    folder: Path
    part_bytes: int = PART_BYTES

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write the report, in the place of the one before."""
        text = json.dumps({"format": FORMAT, **report}, indent=1)
        with (
            new_file(self.folder / REPORT_FILE, ModelError) as partial,
        ):
            partial.write_text(text + "\n", encoding="utf-8")

    def write_metrics(self, lines: str) -> None:
        """Write the figures of the run, lines of JSON."""
        with (
            new_file(self.folder / METRICS_FILE, ModelError) as partial,
        ):
            partial.write_bytes(gzip.compress(lines.encode(), mtime=0))

    def write_weights(self, params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """Write parameters in parts; returns what the report says of them.

        Args:
            params: on the host, nested as `GPT` has them, stacked or not.
            config: their shape.
        """
        plain = replace(config, layers="unrolled", remat="none")
        place = "the run"
        named = named_arrays(params_from_named(flattened(params), plain, place=place), plain)
        files = []
        for number, part in enumerate(_shared_out(named, self.part_bytes)):
            path = self.folder / f"weights-{number}.npz"
            with new_file(path, ModelError) as partial, partial.open("wb") as stream:
                np.savez_compressed(stream, **{name: byte_planes(half) for name, half in part.items()})
            files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)})
        for path in self.folder.glob("weights-*.npz"):
            if path.name not in {file["name"] for file in files}:
                path.unlink()
        return {"dtype": _HALF.name, "files": files, "model": asdict(plain)}


def _shared_out(named: Mapping[str, np.ndarray], limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Parameters in half precision, as many together as `limit` bytes hold."""
    part: dict[str, np.ndarray] = {}
    for name, value in named.items():
        half = value.astype(_HALF)
        if part and sum(one.nbytes for one in part.values()) + half.nbytes > limit:
            yield part
            part = {}
        part[name] = half
    yield part


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a call.

    Raises:
        ModelError: there is none, it is damaged, or of a later format.
    """
    path = folder / REPORT_FILE
    try:
        report = dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {REPORT_FILE} there: give the folder of what came back") from None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): get another copy") from None
    if report.get("format") != FORMAT:
        raise ModelError(f"{path}: of format {report.get('format')}, this version reads {FORMAT}")
    return report


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The figures of a run that came back, a dict a line."""
    with gzip.open(folder / METRICS_FILE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_parts(folder: Path) -> Returned:
    """The weights that came back, and the report.

    Raises:
        ModelError: a part is missing or damaged, or no weights were written.
    """
    report = read_report(folder)
    if not report.get("weights"):
        raise ModelError(f"{folder / REPORT_FILE}: tells of no weights: the call ended before there were any")
    try:
        config = ModelConfig(**report["weights"]["model"])
        files = [(str(file["name"]), str(file["sha256"])) for file in report["weights"]["files"]]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / REPORT_FILE}: cannot be read ({error}): get another copy") from None
    named: dict[str, np.ndarray] = {}
    for name, sha256 in files:
        if Path(name).name != name:
            raise ModelError(f"{folder / REPORT_FILE}: names {name!r}, which is not in the folder")
        named |= _read_part(folder / name, sha256)
    return Returned(Model(config, params_from_named(named, config, place=str(folder))), report)


def _read_part(path: Path, sha256: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ModelError(f"{path}: is missing: get all files that {REPORT_FILE} names")
    if (found := digest_of(path)) != sha256:
        raise ModelError(
            f"{path}: damaged, or of another call (SHA-256 {found[:12]}…, {REPORT_FILE} says {sha256[:12]}…):"
            " get another copy"
        )
    try:
        with np.load(path, allow_pickle=False) as part:
            return {name: from_byte_planes(part[name], _HALF) for name in part.files}
    except _DAMAGED as error:
        raise ModelError(f"{path}: cannot be read ({error}): get another copy") from None
