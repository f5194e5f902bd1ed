"""Validity, match rate and diversity of generated crystals, of one set of samples or of several side by side.

    python benchmarks/match_rate.py SAMPLES TRUTH.csv --out match_rate.json
    python benchmarks/match_rate.py out/none out/syntax out/composition out/symmetry TRUTH.csv

SAMPLES is a folder that `crystallm sample --prompts` wrote from a prepared folder, so that its ids are those of the
truth. To compare constraints, sample once with each level, with the same model, prompts and seed:

    for level in syntax composition symmetry; do
        crystallm sample --model M --prompts DIR --num-samples 4 --seed 0 --constrain $level --out out/$level
    done

Valid: share of all samples that pass the four checks. Matches are at n = 1, of the first sample of each composition:
StructureMatcher's with ltol 0.3, stol 0.5, angle_tol 10, as published; every composition stays in the denominator; the
rate is given for all samples and for the valid ones. Distinct: of the samples of one composition, those that match no
earlier one by the same tolerances, over all its samples; what does not parse is not distinct; the mean over
compositions with two samples or more.
"""

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pebble import ProcessPool

from crystallm_jax.data import read_records
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import match

TIME_LIMIT = 60.0


def main() -> int:
    """Compare and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, nargs="+")
    parser.add_argument("truth", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tables = {}
    for folder in arguments.samples:
        with (folder / "samples.csv").open(newline="") as file:
            tables[folder] = list(csv.DictReader(file))
    wanted = {row["id"] for rows in tables.values() for row in rows}
    truth = {record.id: record.text for record in read_records(arguments.truth) if record.id in wanted}
    with ProcessPool(context=multiprocessing.get_context("spawn")) as pool:
        sets = {str(folder): judged(folder, rows, truth, pool=pool) for folder, rows in tables.items()}
    for name, found in sets.items():
        print(line_of(name, found))
    report = {
        "sets": sets,
        "settings": {"ltol": 0.3, "stol": 0.5, "angle_tol": 10, "n": 1, "time_limit_s": TIME_LIMIT},
        "pymatgen": version("pymatgen"),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def judged(
    folder: Path, rows: Sequence[Mapping[str, str]], truth: Mapping[str, str], *, pool: ProcessPool
) -> dict[str, Any]:
    """Validity, match rate and diversity of one folder."""
    texts: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: int(row["sample"])):
        texts.setdefault(row["id"], []).append((folder / row["file"]).read_text())
    first = [row for row in rows if row["sample"] == "1"]
    matches = [
        pool.schedule(match, args=(texts[row["id"]][0], truth[row["id"]]), timeout=TIME_LIMIT)
        for row in first
    ]
    several = [found for found in texts.values() if len(found) > 1]
    counts = [pool.schedule(count_distinct, args=(found,), timeout=TIME_LIMIT) for found in several]
    found = [result_of(task) for task in matches]
    valid = [row["valid"] == "True" for row in first]
    shares = [
        count / len(of)
        for of, count in zip(several, map(result_of, counts), strict=True)
        if count is not None
    ]
    return {
        "samples": len(rows),
        "valid": round(sum(row["valid"] == "True" for row in rows) / len(rows), 4),
        "compositions": len(first),
        "all": rate(found, len(first)),
        "valid_only": rate(
            [value if ok else None for value, ok in zip(found, valid, strict=True)], len(first)
        ),
        "distinct": round(statistics.fmean(shares), 4) if shares else None,
        "distinct_of_compositions": len(shares),
        "distinct_timed_out": len(several) - len(shares),
    }


def count_distinct(texts: Sequence[str]) -> int:
    """How many of the texts parse and match none before them."""
    kept: list[str] = []
    for text in texts:
        try:
            # What does not match itself has no structure.
            known = match(text, text) is None or any(match(text, other) is not None for other in kept)
        except CIFError:
            continue
        if not known:
            kept.append(text)
    return len(kept)


def result_of(task: Any) -> float | None:
    """What a comparison gave; one that took too long counts as none."""
    try:
        return task.result()
    except TimeoutError:
        return None


def rate(values: Sequence[float | None], denominator: int) -> dict[str, float | None]:
    """Share of matches, and their mean RMSD."""
    matched = [value for value in values if value is not None]
    return {
        "matched": len(matched),
        "match_rate": round(len(matched) / denominator, 4),
        "mean_rmsd": round(statistics.fmean(matched), 4) if matched else None,
    }


def line_of(name: str, found: Mapping[str, Any]) -> str:
    """A row of the table."""
    distinct = "" if found["distinct"] is None else f", {found['distinct']:.1%} distinct"
    rmsd = "" if found["all"]["mean_rmsd"] is None else f" (mean RMSD {found['all']['mean_rmsd']:.3f})"
    return (
        f"{name}: {found['samples']} samples, {found['valid']:.1%} valid; of {found['compositions']} compositions"
        f" {found['all']['match_rate']:.1%} match{rmsd}, {found['valid_only']['match_rate']:.1%} valid and matching"
        f"{distinct}"
    )


if __name__ == "__main__":
    sys.exit(main())
