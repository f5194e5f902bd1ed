"""Speed of sampling over batch, length and precision, against the limit of memory and beside PyTorch.

    python benchmarks/sampling.py [--models small,large] [--peer transformers,published] [--minutes 9] [--out FILE]
    python benchmarks/sampling.py --models small --batch-size 32 --new-tokens 256 --peer transformers --rounds 3

Each case is a process of its own that completes random prompts of 12 tokens with a freshly initialised model, each row
by exactly the tokens asked: a batch of equal rows, or (`100-1000`) four batches of rows of unlike length, which take
each other's places as they end. One run of the same shapes goes before, with the compilation, whose time stands apart.
What does not fit into `--minutes` is left to the next call, which goes on from the JSON. A case that cannot run is a
row with its reason.

The limit is the least time in which memory could be read, (weights + cache) / bandwidth:
- weights: every step reads all parameters but the table of positions once for the whole batch;
- cache: the step that draws a row's token t reads keys and values of its prompt and its t tokens before, no more;
- bandwidth: bytes read and written while one is added to an array of a gibibyte, over the time; measured in each case's
  process, the median of all counts.
A share above 100 % is possible where weights or keys stay in a cache of the processor.

`--peer transformers` measures `generate` of GPT-2 of the same shape (cached, batched, top-k 10) after the case that it
belongs to, with `--rounds` in turns; `--peer published` writes single structures of 350 tokens and computes the whole
text again for each token. They need torch and transformers; the rest needs jax and flax alone. On a CPU nothing else
should run meanwhile. What constraints cost and how many structures are valid, with a trained model, is measured by
`sampling_trained.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sampling_cases import MODELS, STRUCTURE_TOKENS, Case, bytes_to_read, sweep
from train_step import ChildFailedError, finished, listed, opened, start_child, write

PEERS = ("transformers", "published")
# Time that a case gets at most, and what must be left to begin one before any was seen.
CASE_S, FIRST_CASE_S = 570.0, 60.0
CHOICES: Mapping[str, Callable[[str], object]] = {
    "batch_size": int,
    "new_tokens": str,
    "dtype": str,
    "cache_dtype": str,
}
FORMATS = {
    "framework": "{:12}",
    "model": "{:5}",
    "batch_size": "{:>5}",
    "new_tokens": "{:>8}",
    "dtype": "{:8}",
    "cache_dtype": "{:8}",
}
HEAD = (
    "made         model batch   tokens dtype    cache      tokens/s structures/s of limit  × transformers"
    "     memory  compile"
)


def add_round(row: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Add what a process measured to its case's row."""
    row["rounds"] = row.get("rounds", 0) + 1
    # Of the last minute: more than this process's own threads means that the machine was shared.
    row["loads"] = [*row.get("loads", []), round(os.getloadavg()[0], 1)]
    row["runs"] = [*row.get("runs", []), *found["tokens_per_s"]]
    row["tokens_per_s"] = statistics.median(row["runs"])
    # Of how many structures of 350 tokens that is.
    row["structures_per_s"] = row["tokens_per_s"] / STRUCTURE_TOKENS
    row |= {
        name: value for name, value in found.items() if name not in ("tokens_per_s", "versions", "bandwidth")
    }


def key_of(case: Case) -> str:
    """What tells a case from others."""
    return json.dumps(case.describe(), sort_keys=True)


def compare(report: dict[str, Any]) -> None:
    """Add to every row its share of the limit and how many times its peer it is: medians, least and most."""
    rows = {json.dumps(row["case"], sort_keys=True): row for row in report["rows"]}
    report["bandwidth"] = statistics.median(report["bandwidths"]) if report["bandwidths"] else None
    for row in report["rows"]:
        if "tokens_per_s" not in row:
            continue
        case = Case(**row["case"])
        # What the published way reads is another matter: no cache, and the text again for each token.
        if report["bandwidth"] is not None and case.framework != "published":
            limits = case.limits(report["waves"])
            read = bytes_to_read(case, limits)
            row["least_bytes"] = read
            least_s = (read["weights"] + read["cache"]) / report["bandwidth"]
            row["share_of_limit"] = row["tokens_per_s"] * least_s / sum(limits)
        peer = rows.get(key_of(case.peer()), {})
        if case.framework == "jax" and "tokens_per_s" in peer:
            row["times_transformers"] = {
                "median": row["tokens_per_s"] / peer["tokens_per_s"],
                "min": min(row["runs"]) / max(peer["runs"]),
                "max": max(row["runs"]) / min(peer["runs"]),
            }


def line_of(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    names = " ".join(form.format(str(row["case"][name])) for name, form in FORMATS.items())
    if row.get("reason"):
        return f"{names}   {row['reason']}"
    share = f"{row['share_of_limit']:.1%}" if "share_of_limit" in row else ""
    times = ""
    if "times_transformers" in row:
        times = "{median:.2f} ({min:.2f}-{max:.2f})".format(**row["times_transformers"])
    memory = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
    late = "" if not row.get("compilations_in_runs") else f" +{row['compilations_in_runs']} in runs"
    return (
        f"{names} {row['tokens_per_s']:10,.0f} {row['structures_per_s']:12.2f} {share:>8} {times:>15} {memory:>10}"
        f" {row['compile_s']:6.1f} s{late}"
    )


def best_of(report: Mapping[str, Any], **wanted: object) -> float | None:
    """The highest rate of tokens among rows whose cases are so."""
    return max(
        (
            row["tokens_per_s"]
            for row in report["rows"]
            if "tokens_per_s" in row and wanted.items() <= row["case"].items()
        ),
        default=None,
    )


def summary(report: Mapping[str, Any]) -> list[str]:
    """What each model comes to in each precision: at best, against the published way, and with unlike lengths."""
    lines = []
    if report.get("bandwidth"):
        lines.append(f"memory: {report['bandwidth'] / 1e9:,.1f} GB/s, read and written")
    busiest = max((load for row in report["rows"] for load in row.get("loads", [])), default=0.0)
    if busiest > 1.25 * report["cores"]:
        lines.append(
            f"the load was {busiest} on {report['cores']} cores: other programs ran, and threads that wait for each"
            " other, PyTorch's above all, suffer more from that than the rest; measure again on an idle machine"
        )
    for row in report["rows"]:
        if "times_transformers" in row:
            # The table had it before its peer was measured.
            names = ", ".join(str(row["case"][name]) for name in ("model", "dtype"))
            times = "{median:.2f} ({min:.2f}-{max:.2f})".format(**row["times_transformers"])
            lines.append(
                f"{names}, batch {row['case']['batch_size']}, {row['case']['new_tokens']} tokens: {times} times"
                " transformers"
            )
    for model, dtype in sorted({(row["case"]["model"], row["case"]["dtype"]) for row in report["rows"]}):
        case = {"model": model, "dtype": dtype}
        whole = {**case, "new_tokens": str(STRUCTURE_TOKENS)}
        ours = best_of(report, framework="jax", **whole)
        published = best_of(report, framework="published", **whole)
        if ours is not None:
            line = f"{model}, {dtype}: {ours / STRUCTURE_TOKENS:,.2f} structures of {STRUCTURE_TOKENS} tokens a second"
            if published is not None:
                line += (
                    f", {ours / published:,.0f} times the published way ({published / STRUCTURE_TOKENS:.3f})"
                )
            lines.append(line)
        for batch_size in sorted({row["case"]["batch_size"] for row in report["rows"]}):
            of_batch = {"framework": "jax", "batch_size": batch_size, **case}
            equal = best_of(report, new_tokens="550", **of_batch)
            mixed = best_of(report, new_tokens="100-1000", **of_batch)
            if equal is not None and mixed is not None:
                lines.append(
                    f"{model}, {dtype}, batch {batch_size}: lengths of 100-1000 go at {mixed / equal:.0%} of the speed"
                    " of their mean, 550"
                )
    return lines


def measure_all(
    cases: list[Case], report: dict[str, Any], settings: argparse.Namespace, deadline: float
) -> int:
    """Measure what the report lacks until the time is over; returns how many processes are left to run."""
    rows = {json.dumps(row["case"], sort_keys=True): row for row in report["rows"]}
    turns = [(wanted, case) for wanted in range(1, settings.rounds + 1) for case in cases]
    for number, (wanted, case) in enumerate(turns):
        row = rows.setdefault(key_of(case), {"case": case.describe()})
        if finished(row, wanted):
            continue
        left = deadline - time.monotonic()
        if left < FIRST_CASE_S or not measure_one(case, row, report, settings, min(CASE_S, left)):
            return len(turns) - number
        if row not in report["rows"]:
            report["rows"].append(row)
        compare(report)
        write(settings.out, report)
        print(line_of(row), flush=True)
    return 0


def measure_one(
    case: Case, row: dict[str, Any], report: dict[str, Any], settings: argparse.Namespace, limit_s: float
) -> bool:
    """Fill a row, with what was measured or with why nothing was; False if the call's time was too short."""
    impossible = case.why_not()
    if impossible is not None:
        row["reason"] = impossible
        return True
    job = {
        "case": case.describe(),
        "waves": report["waves"],
        "seconds": settings.seconds,
        "runs": settings.runs,
    }
    script = "sampling_jax.py" if case.framework == "jax" else "sampling_torch.py"
    try:
        found = start_child(script, job, limit_s)
    except ChildFailedError as error:
        row["reason"] = str(error)
    except subprocess.TimeoutExpired:
        if limit_s < CASE_S:
            return False
        row["reason"] = f"did not end in {limit_s:.0f} s"
    else:
        add_round(row, found)
        if "bandwidth" in found:
            report["bandwidths"].append(found["bandwidth"])
        report["versions_of_peer"] = found.get("versions") or report.get("versions_of_peer")
    return True


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=listed(str), default=tuple(MODELS), help="of small,large, by commas (both)"
    )
    parser.add_argument(
        "--peer", type=listed(str), default=(), help="of transformers,published, by commas: measure these too"
    )
    for name, kind in CHOICES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=listed(kind),
            help="values to try, by commas, the most wanted first",
        )
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this call (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="no more runs of a process after so many (%(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs a process; the median counts (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="processes a case, in turns (%(default)s)")
    parser.add_argument(
        "--waves", type=int, default=4, help="rows of unlike length, in batches (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_sampling.json"), help="JSON (%(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, print a table and write JSON."""
    settings = parse()
    for name, values, known in (("--models", settings.models, MODELS), ("--peer", settings.peer, PEERS)):
        if not set(values) <= set(known):
            print(f"{name} {','.join(values)}: there are {', '.join(known)}", file=sys.stderr)
            return 2
    try:
        return sweep_here(settings, time.monotonic() + 60 * settings.minutes)
    except (ChildFailedError, subprocess.TimeoutExpired) as error:
        # Of the probe: a case's is in its row.
        print(f"benchmarks/sampling.py: no measurement is possible here: {error}", file=sys.stderr)
        return 1


def sweep_here(settings: argparse.Namespace, deadline: float) -> int:
    """Look what machine this is, and measure what the settings ask."""
    found = start_child("sampling_jax.py", {"probe": list(settings.models)}, CASE_S)
    found["platform"] = "gpu" if found["platform"] in ("gpu", "cuda", "rocm") else found["platform"]
    given = {name: getattr(settings, name) for name in CHOICES if getattr(settings, name) is not None}
    cases = sweep(found["platform"], settings.models, given, peers=settings.peer)
    report = opened(settings.out, found)
    report.setdefault("waves", settings.waves)
    report.setdefault("bandwidths", [])
    if report["waves"] != settings.waves:
        raise SystemExit(f"{settings.out}: measured with --waves {report['waves']}; give another --out")
    print(
        f"{found['device']}, {found['cores']} cores, load {os.getloadavg()[0]:.1f}; jax {found['versions']['jax']};"
        f" {len(cases)} cases\n{HEAD}"
    )
    for row in report["rows"]:
        print(line_of(row))
    left = measure_all(cases, report, settings, deadline)
    print("\n".join(summary(report)))
    if left:
        print(f"{left} left: give the same command again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
