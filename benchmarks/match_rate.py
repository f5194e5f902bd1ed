"""Match rate of generated crystals against true ones, at n = 1: the first sample of each composition.

python benchmarks/match_rate.py SAMPLES TRUTH.csv --out match_rate.json

SAMPLES is a folder that `crystallm sample --prompts` wrote from a prepared folder, so that its ids are those of the
truth. A match is StructureMatcher's with ltol 0.3, stol 0.5, angle_tol 10, as published. Every composition stays in
the denominator. The rate is given for all samples and for those that pass the four checks of validity.
"""

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from pebble import ProcessPool

from crystallm_jax.data import read_records
from crystallm_jax.evaluation import match

TIME_LIMIT = 60.0


def main() -> int:
    """Compare and report."""
    parser = argparse.ArgumentParser(description="Match rate at n = 1.")
    parser.add_argument("samples", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with (arguments.samples / "samples.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sample"] == "1"]
    wanted = {row["id"] for row in rows}
    truth = {record.id: record.text for record in read_records(arguments.truth) if record.id in wanted}
    with ProcessPool(context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.schedule(
                match,
                args=((arguments.samples / row["file"]).read_text(), truth[row["id"]]),
                timeout=TIME_LIMIT,
            )
            for row in rows
        ]
        found = [rmsd(task) for task in tasks]
    valid = [row["valid"] == "True" for row in rows]
    report = {
        "compositions": len(rows),
        "all": rate(found, len(rows)),
        "valid_only": rate(
            [value if ok else None for value, ok in zip(found, valid, strict=True)], len(rows)
        ),
        "settings": {"ltol": 0.3, "stol": 0.5, "angle_tol": 10, "n": 1, "time_limit_s": TIME_LIMIT},
        "pymatgen": version("pymatgen"),
    }
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def rmsd(task: object) -> float | None:
    """What a comparison gave; one that took too long counts as no match."""
    try:
        return task.result()
    except TimeoutError:
        return None


def rate(values: list[float | None], denominator: int) -> dict[str, float | None]:
    """Share of matches, and their mean RMSD."""
    matched = [value for value in values if value is not None]
    return {
        "matched": len(matched),
        "match_rate": round(len(matched) / denominator, 4),
        "mean_rmsd": round(statistics.fmean(matched), 4) if matched else None,
    }


if __name__ == "__main__":
    sys.exit(main())
