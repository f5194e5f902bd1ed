"""Preparation of a corpus: records from files, through worker processes, into a token store.

The order of the store is the order of the input, whatever the number of workers, and every record that came
in is either kept or listed in `dropped.csv`.
"""

import contextlib
import dataclasses
import itertools
import platform
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from pebble import ProcessPool
from tqdm import tqdm

from crystallm_jax import __version__
from crystallm_jax.data.corpus import EMBEDDED, corpus_path
from crystallm_jax.data.pipeline import Dropped, Options, Prepared, prepare_batch, prepare_one, warm_up
from crystallm_jax.data.readers import read_records, unique_ids
from crystallm_jax.data.record import Record
from crystallm_jax.data.store import SPLITS, SplitHeader
from crystallm_jax.data.writer import StoreWriter
from crystallm_jax.errors import DataError
from crystallm_jax.processes import SPAWN, terminate_as_interrupt, usable_cores

PUBLISHED_SPLIT = (0.10, 0.0045)
PUBLISHED_SEED = 20230610

_BATCH = 16
_IN_FLIGHT = 4
_Outcomes: TypeAlias = Generator[tuple[Record, Prepared | Dropped], None, None]
_PACKAGES = ("numpy", "pymatgen", "spglib")


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What became of the input: `n_input` = `n_kept` + `n_dropped`.

    `reasons` counts drops by (stage, reason); those that differ only in numbers and names go under the first.
    """

    out_dir: Path
    n_input: int
    n_kept: int
    n_dropped: int
    splits: Mapping[str, SplitHeader]
    reasons: Mapping[tuple[str, str], int]
    seconds: float

    @property
    def n_tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.tokens for split in self.splits.values())


class _Kept(NamedTuple):
    """What is remembered of a record that is kept: `place` is its number in the input."""

    key: tuple[str, str] | None
    volume: float
    place: int


class _Counted(Iterator[Record]):
    """Records of several groups of inputs, with ids of their own, counted as they are asked for.

    `ends` holds the count at which each finished group ended.
    """

    def __init__(self, groups: Sequence[Sequence[str | Path]]) -> None:
        self.count = 0
        self.ends: list[int] = []
        self._records = unique_ids(itertools.chain.from_iterable(self._read(group) for group in groups))

    def __next__(self) -> Record:
        record = next(self._records)
        self.count += 1
        return record

    def _read(self, group: Sequence[str | Path]) -> Iterator[Record]:
        for path in group:
            yield from read_records(_resolve(path))
        self.ends.append(self.count)


class _Reasons:
    """Counts reasons, those that differ only in numbers and quoted names as one."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def add(self, stage: str, reason: str) -> None:
        kind = (stage, re.sub(r"'[^']*'|\([^)]*\)|\d[\d.,]*", "*", reason))
        self._counts[kind] += 1
        self._first.setdefault(kind, reason)

    def summary(self) -> dict[tuple[str, str], int]:
        return {(kind[0], self._first[kind]): count for kind, count in self._counts.most_common()}


def _resolve(path: str | Path) -> Path:
    """The file of an input; `embedded` is the corpus in the package."""
    return corpus_path() if str(path) == EMBEDDED and not Path(path).exists() else Path(path)


def prepare(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    val_inputs: Sequence[str | Path] = (),
    test_inputs: Sequence[str | Path] = (),
    workers: int | None = None,
    symprec: float = 0.1,
    decimal_places: int = 4,
    dedup: bool = False,
    split: tuple[float, float] | None = None,
    seed: int = PUBLISHED_SEED,
    time_limit: float = 60.0,
    progress: bool = True,
) -> PrepareReport:
    """Turn crystal structures into a prepared folder.

    Args:
        inputs: what `read_records` reads, in this order; `embedded` stands for the corpus in the package.
        out_dir: the folder to write; one that `prepare` wrote before is replaced when all is done.
        val_inputs: the validation set, where it is a file of its own.
        test_inputs: the test set, likewise.
        workers: processes; None for one a core, 0 for none (then there is no time limit either). Workers are
            spawned, so a script must call this under `if __name__ == "__main__":`.
        symprec: tolerance in Å within which symmetry is found.
        decimal_places: of the numbers in the text.
        dedup: of the records with the same cell formula and space group keep the one with the lowest volume a
            formula unit, the first of equals.
        split: fractions for validation and test. As published, test is taken first and validation is the
            fraction of what is left; both are rounded up.
        seed: of the split, which is that of the published script on the same records in the same order.
        time_limit: seconds that one structure may take.
        progress: show it, on a terminal.

    Raises:
        DataError: an input that cannot be read, nothing that can be kept, a folder that cannot be written.
    """
    begin = time.perf_counter()
    _check_options(symprec=symprec, decimal_places=decimal_places, split=split, time_limit=time_limit)
    groups = (tuple(inputs), tuple(val_inputs), tuple(test_inputs))
    if split is not None and any(groups[1:]):
        raise DataError("a split by fractions and sets of their own cannot go together: give one of them")
    records = _Counted(groups)
    options, reasons = Options(symprec, decimal_places, dedup), _Reasons()
    with terminate_as_interrupt(), StoreWriter(out_dir) as writer:
        with contextlib.closing(_outcomes(records, options, workers, time_limit)) as outcomes:
            rows = _collect(outcomes, writer, reasons, progress=progress)
        kept = _lowest_volumes(rows, writer, reasons) if dedup else np.arange(len(writer))
        _check_counts(records.count, len(kept), writer.n_dropped, reasons)
        header = writer.commit(
            split_rows(kept, split, seed=seed) if split else _given_sets(kept, rows, records.ends),
            sources=tuple(str(path) for group in groups for path in group),
            options={**options._asdict(), "split": split, "seed": seed, "time_limit": time_limit},
            counts={"input": records.count, "kept": len(kept), "dropped": writer.n_dropped},
            versions=_versions(),
        )
    counts = records.count, len(kept), writer.n_dropped
    return PrepareReport(
        Path(out_dir), *counts, header.splits, reasons.summary(), time.perf_counter() - begin
    )


def _check_counts(n_input: int, n_kept: int, n_dropped: int, reasons: _Reasons) -> None:
    """Every record that came in is kept or dropped, and some are kept."""
    if n_kept + n_dropped != n_input:
        raise AssertionError(f"{n_input} came in, {n_kept} + {n_dropped} are accounted for")
    if not n_kept:
        raise DataError(_nothing_left(n_input, reasons))


def split_rows(rows: np.ndarray, fractions: tuple[float, float], *, seed: int) -> dict[str, np.ndarray]:
    """Divide rows [N] into train, val and test, each rising, as the published script divides records.

    Args:
        rows: numbers of records.
        fractions: for validation (of what test leaves) and for test.
        seed: of NumPy's legacy generator, which the published script uses through scikit-learn.

    Raises:
        DataError: too few rows for one in each split.
    """
    val, test = fractions
    rest, test_rows = _hold_out(rows, test, seed=seed)
    train_rows, val_rows = _hold_out(rest, val, seed=seed)
    splits = {"train": train_rows, "val": val_rows, "test": test_rows}
    if any(not len(part) for part in splits.values()):
        sizes = ", ".join(f"{name} {len(part)}" for name, part in splits.items())
        raise DataError(
            f"{len(rows)} records cannot be split by {val},{test} ({sizes}): give more or leave out --split"
        )
    return {name: np.sort(part) for name, part in splits.items()}


def _given_sets(kept: np.ndarray, rows: Sequence[_Kept], ends: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows by the group of inputs that they came from; a group without inputs makes no set."""
    places = np.array([rows[row].place for row in kept])
    group = np.searchsorted(ends, places, side="right")
    sets = {name: kept[group == number] for number, name in enumerate(SPLITS)}
    sizes = dict(zip(SPLITS, np.diff([0, *ends]), strict=True))
    for name, size in sizes.items():
        if size and not len(sets[name]):
            raise DataError(f"none of the {size} records of the {name} set can be kept: see its inputs")
    return {name: part for name, part in sets.items() if len(part)}


def _hold_out(rows: np.ndarray, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the rest, the part held out), both shuffled."""
    order = np.random.RandomState(seed).permutation(len(rows))
    n_out = int(np.ceil(fraction * len(rows)))
    return rows[order[n_out:]], rows[order[:n_out]]


def _check_options(
    *, symprec: float, decimal_places: int, split: tuple[float, float] | None, time_limit: float
) -> None:
    if not 0 < symprec <= 1:
        raise DataError(f"symprec is {symprec}, a length in Å: give one above 0 and at most 1, such as 0.1")
    if not 1 <= decimal_places <= 12:
        raise DataError(f"{decimal_places} decimal places: give 1 to 12, such as 4")
    if not time_limit > 0:
        raise DataError(f"a time limit of {time_limit} s: give one above 0, such as 60")
    if split is not None and not all(0 < fraction < 1 for fraction in split):
        raise DataError(
            f"split {split[0]},{split[1]}: give two fractions between 0 and 1, such as 0.1,0.0045"
        )


def _collect(
    outcomes: Iterable[tuple[Record, Prepared | Dropped]],
    writer: StoreWriter,
    reasons: _Reasons,
    *,
    progress: bool,
) -> list[_Kept]:
    """Write what is kept, remember it, and note what is not."""
    rows = []
    quiet = not (progress and sys.stderr.isatty())
    with tqdm(outcomes, desc="prepare", unit=" crystals", disable=quiet, smoothing=0.05) as bar:
        for place, (record, outcome) in enumerate(bar):
            if isinstance(outcome, Dropped):
                writer.drop(record.id, *outcome)
                reasons.add(*outcome)
                bar.set_postfix(dropped=writer.n_dropped, refresh=False)
            else:
                writer.add(record.id, outcome.tokens)
                rows.append(_Kept(outcome.key, outcome.volume, place))
    return rows


def _lowest_volumes(rows: Sequence[_Kept], writer: StoreWriter, reasons: _Reasons) -> np.ndarray:
    """Rows that stay when of each key only the lowest volume does; the others are noted as dropped."""
    best: dict[tuple[str, str] | None, int] = {}
    for row, kept in enumerate(rows):
        if kept.key not in best or kept.volume < rows[best[kept.key]].volume:
            best[kept.key] = row
    for row, kept in enumerate(rows):
        if best[kept.key] != row:
            outcome = Dropped("dedup", f"same cell formula and space group as '{writer.ids[best[kept.key]]}'")
            writer.drop(writer.ids[row], *outcome)
            reasons.add(*outcome)
    return np.array(sorted(best.values()), dtype=np.int64)


def _outcomes(
    records: Iterator[Record], options: Options, workers: int | None, time_limit: float
) -> _Outcomes:
    if workers == 0:
        return ((record, prepare_one(record, options)) for record in records)
    return _in_workers(records, options, usable_cores() if workers is None else workers, time_limit)


def _in_workers(records: Iterator[Record], options: Options, workers: int, time_limit: float) -> _Outcomes:
    """Outcomes in the order of the records; at most a few batches a worker are in memory.

    A batch has the time of one structure. One that takes longer, or whose worker dies, is done again one by
    one, so that only the culprit is dropped.
    """
    pool = ProcessPool(max_workers=workers, initializer=warm_up, context=SPAWN)

    def submit(batch: Sequence[Record]) -> "Future[Any]":
        try:
            return pool.schedule(prepare_batch, args=(batch, options), timeout=time_limit)
        except RuntimeError as error:  # the pool is broken
            raise _broken(error) from error

    def settle(batch: Sequence[Record], future: "Future[Any]") -> _Outcomes:
        error = future.exception()
        if error is None:
            yield from zip(batch, future.result(), strict=True)
        elif isinstance(error, BrokenProcessPool):
            raise _broken(error) from error
        elif len(batch) > 1:
            retries = [(record, submit((record,))) for record in batch]
            for record, retry in retries:
                yield from settle((record,), retry)
        else:
            yield batch[0], Dropped("limit", _why(error, time_limit))

    pending: deque[tuple[tuple[Record, ...], Future[Any]]] = deque()
    try:
        while batch := tuple(itertools.islice(records, _BATCH)):
            pending.append((batch, submit(batch)))
            if len(pending) >= _IN_FLIGHT * workers:
                yield from settle(*pending.popleft())
        while pending:
            yield from settle(*pending.popleft())
    finally:
        pool.stop()
        pool.join()


def _why(error: BaseException, time_limit: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no result in {time_limit:g} s: raise --time-limit or leave it out"
    return f"the worker process ended ({type(error).__name__}: {' '.join(str(error).split())}): leave it out"


def _broken(error: BaseException) -> DataError:
    return DataError(
        f"the worker processes cannot start or were all killed ({error}): give fewer --workers; "
        "a script calls prepare under 'if __name__ == \"__main__\":'"
    )


def _nothing_left(n_input: int, reasons: _Reasons) -> str:
    (stage, reason), count = next(iter(reasons.summary().items()))
    return f"none of {n_input:,} records can be kept; most often ({count:,}), at '{stage}': {reason}"


def _versions() -> dict[str, str]:
    versions = {"crystallm-jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
