"""From the journals of a run to its tables, a sample at a time."""

import contextlib
import csv
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.cif import CIFError
from crystallm_jax.cif.postprocess import named_spacegroup
from crystallm_jax.sample_run.journal import Entry, parse_entry, read_entries
from crystallm_jax.sample_run.run_folder import (
    CIF_FOLDER,
    STRUCTURES_FILE,
    TABLE_FILE,
    ResultsFolder,
    file_name,
)
from crystallm_jax.sample_run.targets import ValidTarget
from crystallm_jax.sampling.prompts import Prompt

_VERDICTS = (
    "formula_consistent",
    "multiplicity_consistent",
    "bond_length_score",
    "space_group_consistent",
    "sensible",
    "error",
)
_COLUMNS = (
    "id",
    "sample",
    "file",
    "prompt",
    "spacegroup",
    "seed",
    "tokens",
    "finished",
    "log_prob",
    "rank",
    "seconds",
    "valid",
    "reasons",
    *_VERDICTS,
    "omitted",
    "returns",
)


class Index(NamedTuple):
    """Where the entries of the samples are, an array for each of a sample's values, by prompt and sample index.

    Attributes:
        journal: which one.
        place: in bytes.
        prompt: index.
        sample: index.
        finished: whether the text came to its end.
        log_prob: in nats.
        valid: the verdict.
    """

    journal: np.ndarray
    place: np.ndarray
    prompt: np.ndarray
    sample: np.ndarray
    finished: np.ndarray
    log_prob: np.ndarray
    valid: np.ndarray

    def at(self, places: np.ndarray) -> "Index":
        """Some of the samples, by their numbers here or by a mask."""
        return Index(*(values[places] for values in self))


class Totals(NamedTuple):
    """What the samples of a table come to.

    Attributes:
        samples: how many.
        valid: of them.
        reasons: how many of the others have which first reason against them.
        generated_tokens: of all.
        structures: frames written.
        symmetrized: CIFs written.
    """

    samples: int
    valid: int
    reasons: dict[str, int]
    generated_tokens: int
    structures: int
    symmetrized: int


def read_index(journals: Sequence[Path], target: ValidTarget | None = None) -> Index:
    """The samples of journals, each once; with a target, those that are kept for it."""
    columns = [array(code) for code in "hqiibdb"]
    for number, path in enumerate(journals):
        for place, entry in read_entries(path):
            values = (
                number,
                place,
                entry.prompt_index,
                entry.sample_index,
                entry.finished,
                entry.log_prob,
                entry.verdicts["valid"],
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    index = Index(*(np.array(column) for column in columns))
    index = index._replace(finished=index.finished.astype(bool), valid=index.valid.astype(bool))
    # A sample that was made again, as its CIF was lost, stands there twice: the last counts.
    index = index.at(np.lexsort((np.arange(len(index.place)), index.sample, index.prompt)))
    again = (np.diff(index.prompt) == 0) & (np.diff(index.sample) == 0)
    index = index.at(~np.append(again, np.zeros(min(len(index.place), 1), bool)))
    return index if target is None else index.at(_kept(index, target))


def ranks(index: Index) -> np.ndarray:
    """The rank of each sample among those of its prompt: finished ones first, by log-probability, ties by index."""
    order = np.lexsort((index.sample, -index.log_prob, ~index.finished, index.prompt))
    sorted_prompts = index.prompt[order]
    first = np.searchsorted(sorted_prompts, sorted_prompts)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first + 1
    return rank


def write_tables(
    folder: ResultsFolder, index: Index, prompts: Sequence[Prompt], *, seed: int, journals: Sequence[Path]
) -> Totals:
    """Write `samples.csv`, a row a sample, and `structures.extxyz`, a frame a sample that describes a structure."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with (
        folder.becoming(TABLE_FILE) as table_path,
        folder.becoming(STRUCTURES_FILE) as frames_path,
        table_path.open("w", newline="", encoding="utf-8") as table_file,
        frames_path.open("w", encoding="utf-8") as frames,
    ):
        table = csv.DictWriter(table_file, _COLUMNS)
        table.writeheader()
        for entry, rank in zip(_entries(index, journals), ranks(index).tolist(), strict=True):
            prompt = prompts[entry.prompt_index]
            table.writerow(_row(entry, prompt, seed=seed, rank=rank))
            if entry.frame is not None:
                frames.write(_frame(entry, entry.frame, prompt, rank=rank))
            counts["structures"] += entry.frame is not None
            counts["symmetrized"] += entry.symmetrized
            counts["tokens"] += entry.generated_tokens
            if entry.verdicts["valid"]:
                counts["valid"] += 1
            else:
                # Each invalid sample counts once, under the first thing that is wrong with it.
                reasons[_first_reason(entry)] += 1
    by_count = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return Totals(
        len(index.place),
        counts["valid"],
        dict(by_count),
        counts["tokens"],
        counts["structures"],
        counts["symmetrized"],
    )


def _kept(index: Index, target: ValidTarget) -> np.ndarray:
    mask = np.zeros(len(index.place), bool)
    starts = np.flatnonzero(np.diff(index.prompt, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(mask)], strict=True):
        mask[start : start + target.kept(index.valid[start:end].tolist())] = True
    return mask


def _entries(index: Index, journals: Sequence[Path]) -> Iterator[Entry]:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in journals]
        for number, place in zip(index.journal.tolist(), index.place.tolist(), strict=True):
            files[number].seek(place)
            yield parse_entry(files[number].readline())


def _row(entry: Entry, prompt: Prompt, *, seed: int, rank: int) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "sample": entry.sample_index + 1,
        "file": f"{CIF_FOLDER}/{file_name(prompt, entry.sample_index)}",
        "prompt": prompt.text.split("\n", 1)[0],
        "spacegroup": _asked_spacegroup(prompt),
        "seed": seed,
        "tokens": entry.tokens,
        "finished": entry.finished,
        "log_prob": entry.log_prob,
        "rank": rank,
        "seconds": entry.seconds,
        "valid": entry.verdicts["valid"],
        "reasons": " ".join(entry.verdicts["reasons"]),
        **{name: entry.verdicts[name] for name in _VERDICTS},
        "omitted": entry.omitted,
        "returns": entry.returns,
    }


def _frame(entry: Entry, frame: str, prompt: Prompt, *, rank: int) -> str:
    count, comment, rows = frame.split("\n", 2)
    valid = "T" if entry.verdicts["valid"] else "F"
    values = f'id="{prompt.id}" sample={entry.sample_index + 1} valid={valid}'
    return f"{count}\n{comment} {values} log_prob={entry.log_prob} rank={rank}\n{rows}"


def _first_reason(entry: Entry) -> str:
    if not entry.finished:
        return "unplaced" if entry.unplaced else "unfinished"
    reasons = entry.verdicts["reasons"]
    return str(reasons[0]) if reasons else "unknown"


def _asked_spacegroup(prompt: Prompt) -> str:
    try:
        return named_spacegroup(prompt.text)
    except CIFError:  # the prompt leaves it to the model
        return ""
