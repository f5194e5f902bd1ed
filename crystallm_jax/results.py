"""The folder of a sampling run: CIFs, a table, structures for other programs, and how they came about."""

import contextlib
import csv
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crystallm_jax.api import CrystalModel, Sample
from crystallm_jax.cif import CIFError
from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation import ValidatorPool, ValidityReport
from crystallm_jax.processes import Interruption
from crystallm_jax.sampling.generate import GenerationRequest
from crystallm_jax.sampling.prompts import Prompt

if TYPE_CHECKING:
    from ase import Atoms

CIF_FOLDER = "cifs"
TABLE_FILE = "samples.csv"
STRUCTURES_FILE = "structures.extxyz"
RUN_FILE = "run.json"

_COLUMNS = (
    "id",
    "sample",
    "file",
    "prompt",
    "tokens",
    "finished",
    "log_prob",
    "valid",
    "reasons",
    "formula_consistent",
    "multiplicity_consistent",
    "bond_length_score",
    "space_group_consistent",
    "sensible",
    "error",
)
# Verdicts after which reading the structure again would be slow or futile.
_NO_STRUCTURE = {"unparsable", "too_large", "timeout", "memory", "crashed"}


class Outcome(NamedTuple):
    """A sample, the name of its prompt, and its verdicts."""

    prompt: Prompt
    sample: Sample
    report: ValidityReport

    @property
    def file_name(self) -> str:
        """`ID__N.cif`, N counted from 1."""
        return f"{self.prompt.id}__{self.sample.sample_index + 1}.cif"


class Summary(NamedTuple):
    """What a sampling run came to."""

    samples: int
    valid: int
    reasons: dict[str, int]
    generated_tokens: int
    sampling_seconds: float
    seconds: float


class ResultsFolder:
    """Writes one sampling run; every file appears under its name when it is complete.

    Args:
        path: the folder, new or without samples.

    Raises:
        SamplingError: samples are there already, or the disk takes no more.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if (self.path / TABLE_FILE).exists() or any((self.path / CIF_FOLDER).glob("*")):
            raise SamplingError(f"{self.path}: holds samples already; choose another --out or remove them")
        try:
            (self.path / CIF_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SamplingError(f"{self.path}: cannot be made: {error.strerror}") from None

    def write_cif(self, name: str, text: str) -> None:
        """Write one CIF."""
        self._write(f"{CIF_FOLDER}/{name}", text)

    def write_table(self, outcomes: Sequence[Outcome]) -> None:
        """Write `samples.csv`, a row a sample."""
        with (
            self._becoming(TABLE_FILE) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, _COLUMNS)
            table.writeheader()
            table.writerows(map(_row, outcomes))

    def write_structures(self, outcomes: Sequence[Outcome]) -> int:
        """Write `structures.extxyz`, a frame a sample that describes a structure; returns their number."""
        from ase.io import write  # noqa: PLC0415 - slow to import

        frames = []
        for outcome in outcomes:
            atoms = None if _NO_STRUCTURE & set(outcome.report.reasons) else _atoms(outcome.sample)
            if atoms is None:
                continue
            atoms.info = {
                "id": outcome.prompt.id,
                "sample": outcome.sample.sample_index + 1,
                "valid": outcome.report.valid,
                "log_prob": outcome.sample.log_prob,
            }
            frames.append(atoms)
        with self._becoming(STRUCTURES_FILE) as partial:
            write(partial, frames, format="extxyz")
        return len(frames)

    def write_run(self, **values: Any) -> None:
        """Write `run.json`: settings, versions and what came of it."""
        names = ("jax", "flax", "pymatgen", "pymatgen-core", "spglib", "numpy", "crystallm-jax")
        versions = {name: _version(name) for name in names} | {"python": platform.python_version()}
        self._write(RUN_FILE, json.dumps({**values, "versions": versions}, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        with self._becoming(name) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def _becoming(self, name: str) -> Iterator[Path]:
        """A temporary name, renamed when all is written."""
        partial = self.path / f"{name}.partial"
        try:
            yield partial
            partial.replace(self.path / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise SamplingError(f"{self.path / name}: cannot be written: {error.strerror}") from None


def sample_into(
    folder: ResultsFolder,
    model: CrystalModel,
    prompts: Sequence[Prompt],
    request: GenerationRequest,
    *,
    pool: ValidatorPool,
    on_batch: Any = None,
    interruption: Interruption | None = None,
) -> Summary:
    """Sample, validate and write; validation runs in the pool while the device goes on.

    Args:
        folder: where to.
        model: what samples.
        prompts: with names that are unlike each other (`unique_ids`).
        request: how.
        pool: validates.
        on_batch: called with the number of samples of each batch as it is done.
        interruption: looked at after each batch and each verdict.
    """
    interruption = interruption or Interruption()
    started = time.perf_counter()
    pending: list[tuple[Sample, Future[ValidityReport]]] = []
    outcomes: list[Outcome] = []
    sampling_seconds = 0.0
    try:
        for batch in model.generate_batches([prompt.text for prompt in prompts], request):
            sampling_seconds = time.perf_counter() - started
            for sample in batch:
                pending.append((sample, pool.submit(sample.cif)))
                name = f"{prompts[sample.prompt_index].id}__{sample.sample_index + 1}.cif"
                folder.write_cif(name, sample.cif)
            if on_batch is not None:
                on_batch(len(batch))
            interruption.check()
        for _, future in pending:
            future.result()
            interruption.check()
        outcomes = [Outcome(prompts[s.prompt_index], s, future.result()) for s, future in pending]
    finally:
        # After Ctrl-C, too, the table says what the CIFs that are there are worth.
        if not outcomes:
            outcomes = [Outcome(prompts[s.prompt_index], s, f.result()) for s, f in pending if f.done()]
        outcomes.sort(key=lambda outcome: (outcome.sample.prompt_index, outcome.sample.sample_index))
        if pending:
            folder.write_table(outcomes)
    frames = folder.write_structures(outcomes)
    summary = _summarise(outcomes, model, prompts, sampling_seconds, time.perf_counter() - started)
    folder.write_run(
        model=model.name,
        parameters=model.num_params,
        prompts=len(prompts),
        request=asdict(request),
        structures=frames,
        validity={"symprec": 0.1, "bond_length_cutoff": 1.0, "denominator": "all samples"},
        **summary._asdict(),
    )
    return summary


def _summarise(
    outcomes: Sequence[Outcome],
    model: CrystalModel,
    prompts: Sequence[Prompt],
    sampling_seconds: float,
    seconds: float,
) -> Summary:
    prompt_tokens = [len(model.tokenizer.encode_cif(prompt.text)) for prompt in prompts]
    generated = sum(len(o.sample.token_ids) - prompt_tokens[o.sample.prompt_index] for o in outcomes)
    # Each invalid sample counts once, under the first thing that is wrong with it.
    reasons = Counter(_first_reason(outcome) for outcome in outcomes if not outcome.report.valid)
    valid = sum(outcome.report.valid for outcome in outcomes)
    return Summary(
        len(outcomes),
        valid,
        dict(reasons.most_common()),
        generated,
        round(sampling_seconds, 2),
        round(seconds, 2),
    )


def _first_reason(outcome: Outcome) -> str:
    if not outcome.sample.finished:
        return "unfinished"
    return outcome.report.reasons[0] if outcome.report.reasons else "unknown"


def _atoms(sample: Sample) -> "Atoms | None":
    """The crystal for ASE, which knows no partly occupied sites and no unknown elements; None for such."""
    from pymatgen.core import DummySpecies  # noqa: PLC0415 - slow to import
    from pymatgen.io.ase import AseAtomsAdaptor  # noqa: PLC0415

    try:
        structure = sample.structure()
    except CIFError:
        return None
    if not structure.is_ordered or any(isinstance(kind, DummySpecies) for kind in structure.composition):
        return None
    return AseAtomsAdaptor.get_atoms(structure, msonable=False)


def _row(outcome: Outcome) -> dict[str, Any]:
    report = outcome.report
    return {
        "id": outcome.prompt.id,
        "sample": outcome.sample.sample_index + 1,
        "file": f"{CIF_FOLDER}/{outcome.file_name}",
        "prompt": outcome.prompt.text.split("\n", 1)[0],
        "tokens": len(outcome.sample.token_ids),
        "finished": outcome.sample.finished,
        "log_prob": round(outcome.sample.log_prob, 4),
        "valid": report.valid,
        "reasons": " ".join(report.reasons),
        "formula_consistent": report.formula_consistent,
        "multiplicity_consistent": report.multiplicity_consistent,
        "bond_length_score": report.bond_length_score,
        "space_group_consistent": report.space_group_consistent,
        "sensible": report.sensible,
        "error": report.error,
    }


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError  # noqa: PLC0415

    try:
        return version(name)
    except PackageNotFoundError:
        # Run from a checkout that was not installed.
        return None
