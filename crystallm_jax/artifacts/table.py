"""The published files of CrystaLLM: names, kinds, sizes and checksums, and how one is asked for by name."""

import csv
import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crystallm_jax.errors import DataError

RECORD = "https://zenodo.org/records/10642388"
LICENCE = f"CC BY 4.0; L. M. Antunes, K. T. Butler, R. Grau-Crespo (CrystaLLM); {RECORD}"

MODEL = "model"
KINDS = {
    MODEL: "models: checkpoints of the published code",
    "tokens": "tokens: training data, and where in it each structure starts",
    "prompts": "prompts: those of the benchmarks' test sets",
    "challenge": "challenge set: CIFs and prompts of structures that the models had not seen",
    "cifs": "CIFs: the main data set (v1) and the benchmarks, as gathered (orig), without duplicates (dedup), "
    "preprocessed (prep), and split",
    "generated": "generated: what the published models made of the benchmarks' prompts, as they wrote it (raw) or "
    "postprocessed",
}
"""What kinds there are, each with a line about it."""

_ARCHIVES = (".tar.gz", ".zip")
_ENDINGS = (*_ARCHIVES, ".pkl.gz", ".pkl")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Artifact:
    """A published file.

    Attributes:
        name: the file's name.
        kind: one of `KINDS`.
        size: bytes, as far as they are known.
        slack: how many bytes it may have more or fewer.
        md5: of its bytes, in hexadecimal.
    """

    name: str
    kind: str
    size: int
    slack: int
    md5: str

    @property
    def stem(self) -> str:
        """The name without its ending."""
        ending = next((ending for ending in _ENDINGS if self.name.endswith(ending)), "")
        return self.name.removesuffix(ending)

    @property
    def is_archive(self) -> bool:
        """Whether it holds files that can be unpacked; a pickle is none."""
        return self.name.endswith(_ARCHIVES)

    def may_have(self, size: int) -> bool:
        """Whether it may have this many bytes."""
        return abs(size - self.size) <= self.slack


@functools.cache
def published() -> tuple[Artifact, ...]:
    """All of the record's files, by kind."""
    with (Path(__file__).parent / "table.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_artifact(row) for row in csv.DictReader(file))


def _artifact(row: dict[str, str]) -> Artifact:
    number, unit = row["size"].split()
    size = round(float(number) * _UNITS[unit])
    # The record rounds sizes to a tenth of their unit.
    return Artifact(row["name"], row["kind"], size, max(size // 100, _UNITS[unit] // 10), row["md5"])


def model_archives() -> tuple[str, ...]:
    """The names of the published models, without endings."""
    return tuple(artifact.stem for artifact in published() if artifact.kind == MODEL)


def find(name: str, artifacts: Sequence[Artifact]) -> Artifact:
    """The file of this name, whose ending may be left out.

    Raises:
        DataError: there is none, or several differ by the ending alone.
    """
    whole = {artifact.name: artifact for artifact in artifacts}
    if name in whole:
        return whole[name]
    found = [artifact for artifact in artifacts if artifact.stem == name]
    if len(found) > 1:
        raise DataError(
            f"{name}: there are several: {' and '.join(item.name for item in found)}; name one of them"
        )
    if not found:
        raise DataError(f"{name}: no published file has this name; {_suggestion(name, artifacts)}")
    return found[0]


def _suggestion(name: str, artifacts: Sequence[Artifact]) -> str:
    whole = name.endswith(_ENDINGS)
    names = dict.fromkeys(artifact.name if whole else artifact.stem for artifact in artifacts)
    containing = [text for text in names if name and name in text][:3]
    close = containing or difflib.get_close_matches(name, names, n=1)
    hint = "`crystallm download --list` shows all"
    return f"did you mean {' or '.join(close)}? {hint}" if close else hint


def size_text(size: float) -> str:
    """A number of bytes as the record shows them."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size:.0f} B"
