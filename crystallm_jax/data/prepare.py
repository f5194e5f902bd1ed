"""Preparation of a corpus: records from files, through workers, into a token store or a folder of texts.

Every record that came in is either kept or listed in `dropped.csv`. The same inputs and seed give the same bytes,
whatever the number of workers. What is done is kept in the work folder `OUT/.prepare`, so that a run that was killed
goes on there; it is removed at the end.
"""

import dataclasses
import itertools
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax import __version__
from crystallm_jax.data.preparing import executors
from crystallm_jax.data.preparing.catalogue import Catalogue, Row
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.inputs import Inputs
from crystallm_jax.data.preparing.marks import read_pairs
from crystallm_jax.data.preparing.pipeline import Dropped, Prepared, Recipe
from crystallm_jax.data.preparing.progress import Progress
from crystallm_jax.data.preparing.selection import (
    Drop,
    Selection,
    count_drops,
    count_references,
    dropped,
    mark,
    select,
    selected,
    unusable_references,
)
from crystallm_jax.data.preparing.writer import (
    PREPARED_NAMES,
    WORK_FOLDER,
    StoreWriter,
    TextWriter,
    refuse_foreign,
)
from crystallm_jax.data.reading.texts import printable
from crystallm_jax.data.reasons import Reasons
from crystallm_jax.data.record import Record
from crystallm_jax.data.store import SplitHeader, StoreHeader
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.signals import StopRequest, stop_at_once

_BATCH = 16
_BATCH_CHARACTERS = 2**20
_COMMIT_RECORDS = 1024
_COMMIT_SECONDS = 10.0
_COMMIT_BYTES = 64 * 2**20
_CATALOGUE_FORMAT = 1
_PACKAGES = ("numpy", "pymatgen", "spglib")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What became of the input: `n_input` = `n_kept` + `n_dropped`.

    Attributes:
        out_dir: the folder that was written.
        n_input: records read, without those of the set to exclude.
        n_kept: records written.
        n_dropped: records in `dropped.csv`.
        splits: the header of each split of a token store.
        texts: records of each split, where texts were written and no tokens.
        reasons: drops by (stage, reason), most often first; what a reason names of its record is left open as `…` where
            it is not the same for all.
        n_excluding: records of the set to exclude.
        unusable: those of them that could not be read, so that nothing is excluded by them.
        n_underrepresented: records marked as under-represented.
        resumed_at: records that an earlier run had done.
        seconds: of this run.
    """

    out_dir: Path
    n_input: int
    n_kept: int
    n_dropped: int
    splits: Mapping[str, SplitHeader]
    texts: Mapping[str, int]
    reasons: Mapping[tuple[str, str], int]
    n_excluding: int
    unusable: tuple[Drop, ...]
    n_underrepresented: int
    resumed_at: int
    seconds: float

    @property
    def n_tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.tokens for split in self.splits.values())


def prepare(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    val_inputs: Sequence[str | Path] = (),
    test_inputs: Sequence[str | Path] = (),
    exclude_inputs: Sequence[str | Path] = (),
    underrepresented: str | Path | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    selection: Selection = Selection(),  # noqa: B008  frozen
    execution: Execution = Execution(),  # noqa: B008  frozen
    progress: bool = True,
) -> PrepareReport:
    """Turn crystal structures into a prepared folder; called again after a kill, it goes on where it was.

    Args:
        inputs: what `read_records` reads, and token archives, in this order; `embedded` stands for the corpus in the
            package.
        out_dir: the folder to write; one that `prepare` wrote before is replaced when all is done.
        val_inputs: the validation set, where it is a file of its own.
        test_inputs: the test set, likewise.
        exclude_inputs: a benchmark, say: its structures are left out of the sets.
        underrepresented: a file of (cell composition, space group) pairs whose records are marked.
        recipe: what becomes of each record.
        selection: which of them stay, and in which set.
        execution: where and how fast; the result does not depend on it.
        progress: show it, on a terminal.

    Raises:
        DataError: an input that cannot be read, nothing that can be kept, a folder that cannot be written.
        ConfigError: settings that contradict each other.
    """
    begin = time.perf_counter()
    out_dir = Path(out_dir)
    refuse_foreign(out_dir)
    sources = Inputs((inputs, val_inputs, test_inputs, exclude_inputs))
    if (endangered := sources.lie_among(PREPARED_NAMES, out_dir)) is not None:
        raise DataError(f"{endangered} is an input and would be replaced: give another --out than {out_dir}")
    if selection.split is not None and sources.has_sets_apart:
        raise ConfigError("a split and sets of their own cannot go together: give one of them")
    # Read now: a wrong one should not end the run after hours.
    pairs = () if underrepresented is None else tuple(read_pairs(Path(underrepresented)))
    plan = {
        "catalogue": _CATALOGUE_FORMAT,
        "inputs": sources.fingerprint(),
        "recipe": dataclasses.asdict(recipe),
        "time_limit": execution.time_limit,
        "versions": _versions(),
    }
    with stop_at_once() as stop, Catalogue(out_dir / WORK_FOLDER, plan) as catalogue:
        resumed_at = _announced(catalogue)
        with closing(Progress(sources.bytes(), shown=progress)) as bar:
            _fill(catalogue, sources, recipe, execution, bar, stop)
        connection = catalogue.connection
        sets = select(connection, selection)
        marked = mark(connection, sets, pairs, below=selection.underrepresented_below)
        counts = _counts(catalogue, sets)
        options = {
            **_as_json(recipe),
            **_as_json(selection),
            "time_limit": execution.time_limit,
            "exclude": [printable(str(path)) for path in exclude_inputs],
            "underrepresented": None if underrepresented is None else printable(str(underrepresented)),
        }
        written = _write(catalogue, sets, recipe, _Description(sources.names, options, counts._asdict()))
        return PrepareReport(
            out_dir,
            n_input=counts.input,
            n_kept=counts.kept,
            n_dropped=counts.dropped,
            splits=written.splits,
            texts=written.texts,
            reasons=written.reasons,
            n_excluding=counts.excluding,
            unusable=tuple(unusable_references(connection)),
            n_underrepresented=marked,
            resumed_at=resumed_at,
            seconds=time.perf_counter() - begin,
        )


class _Counts(NamedTuple):
    """`input` = `kept` + `dropped`; `excluding` are the records of the set to exclude."""

    input: int
    kept: int
    dropped: int
    excluding: int


class _Description(NamedTuple):
    """What `meta.json` says beside the splits."""

    sources: tuple[str, ...]
    options: Mapping[str, Any]
    counts: Mapping[str, int]


class _Written(NamedTuple):
    splits: Mapping[str, SplitHeader]
    texts: Mapping[str, int]
    reasons: Mapping[tuple[str, str], int]


def _announced(catalogue: Catalogue) -> int:
    """How many records are done already, said in a line."""
    place = len(catalogue)
    if catalogue.begun_anew:
        logger.info("%s: an unfinished run had other inputs or settings; begun anew", catalogue.folder.parent)
    elif place:
        logger.info("%s: %s records are done already; going on", catalogue.folder.parent, f"{place:,}")
    return place


def _fill(
    catalogue: Catalogue,
    sources: Inputs,
    recipe: Recipe,
    execution: Execution,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """Prepare every record that the catalogue does not hold yet."""
    place = len(catalogue)
    records = sources.records(progress.add_bytes)
    skipped = sum(1 for _ in itertools.islice(records, place))
    if skipped != place:
        raise AssertionError(f"the inputs gave {skipped} records, {place} are done")
    progress.begin(place)
    rows: list[Row] = []
    since = time.monotonic()
    waiting = 0
    with closing(executors.run(_batches(records), recipe, execution)) as results:
        for batch, outcomes in results:
            for record, outcome in zip(batch, outcomes, strict=True):
                rows.append(Row(sources.part(place + len(rows)), _one_word(record.id), outcome))
            progress.add_records(len(batch), sum(isinstance(outcome, Dropped) for outcome in outcomes))
            waiting += sum(len(outcome.payload) for outcome in outcomes if isinstance(outcome, Prepared))
            full = len(rows) >= _COMMIT_RECORDS or waiting > _COMMIT_BYTES
            if full or time.monotonic() - since > _COMMIT_SECONDS:
                catalogue.append(rows)
                place, rows, waiting, since = place + len(rows), [], 0, time.monotonic()
            stop.check()
    catalogue.append(rows)


def _batches(records: Iterator[Record]) -> Iterator[tuple[Record, ...]]:
    """Records by the dozen, large ones by themselves: a worker's time and everyone's memory are bounded."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text)
        if len(batch) == _BATCH or size > _BATCH_CHARACTERS:
            yield tuple(batch)
            batch, size = [], 0
    if batch:
        yield tuple(batch)


def _counts(catalogue: Catalogue, sets: Mapping[str, np.ndarray]) -> _Counts:
    """Every record that came in is kept or dropped, and some are kept.

    Raises:
        DataError: none is kept; the work folder goes, since nothing in it can be used.
    """
    excluding = count_references(catalogue.connection)
    n_input = len(catalogue) - excluding
    kept, lost = sum(map(len, sets.values())), count_drops(catalogue.connection)
    if kept + lost != n_input:
        raise AssertionError(f"{n_input} came in, {kept} + {lost} are accounted for")
    if not kept:
        reasons = Reasons()
        for drop in dropped(catalogue.connection):
            reasons.add(drop.stage, drop.reason)
        catalogue.remove()
        if not n_input:
            raise DataError("the inputs hold no records: check them")
        (stage, reason), count = next(iter(_summary(reasons).items()))
        raise DataError(
            f"none of {n_input:,} records can be kept; most often ({count:,}), at '{stage}': {reason}"
        )
    return _Counts(n_input, kept, lost, excluding)


def _write(
    catalogue: Catalogue, sets: Mapping[str, np.ndarray], recipe: Recipe, description: _Description
) -> _Written:
    """Write what is kept, in the order of the sets, and what is not."""
    reasons = Reasons()
    out_dir = catalogue.folder.parent
    writer_type = StoreWriter if recipe.gives_tokens else TextWriter
    with writer_type(out_dir, catalogue.folder) as writer:
        for split, rows in sets.items():
            for record in selected(catalogue.connection, rows):
                data = catalogue.read(record.offset, record.length)
                writer.add_payload(record.id, data, split=split, underrepresented=record.underrepresented)
        for drop in dropped(catalogue.connection):
            writer.drop(*drop)
            reasons.add(drop.stage, drop.reason)
        result = writer.commit(**description._asdict(), versions=_versions())
    if isinstance(result, StoreHeader):
        return _Written(result.splits, {}, _summary(reasons))
    return _Written({}, result, _summary(reasons))


def _summary(reasons: Reasons) -> dict[tuple[str, str], int]:
    counts: Counter[tuple[str, str]] = Counter()
    for group in reasons.groups():
        counts[group.stage, group.reason] += group.inputs
    return dict(counts.most_common())


def _one_word(name: str) -> str:
    return "_".join(name.split()) or "unnamed"


def _as_json(settings: Recipe | Selection) -> dict[str, Any]:
    """Settings as they stand in `meta.json`."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _versions() -> dict[str, str]:
    versions = {"crystallm-jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
