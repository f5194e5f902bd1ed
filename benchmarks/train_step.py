"""Speed of the training step over batch, rematerialisation, attention, precision and layers, beside PyTorch.

    python benchmarks/train_step.py [--models small,large] [--peer torch] [--minutes 9] [--out FILE]
    python benchmarks/train_step.py --models large --batch-size 16,32 --remat none,dots --differences 9
    python benchmarks/train_step.py --models large --profile DIR

Each case is a process of its own that trains the model on random tokens, exactly as the training loop does: the
compiled step over a donated state, the next batch placed and the metrics fetched while a step runs. Cases are taken
in order of interest: the best guess for this kind of device, what differs from it in one setting, then (with
`--differences`) in more. What does not fit into `--minutes` is left to the next call, which goes on from the JSON. A
case that cannot run is a row with its reason.

`--peer torch` measures `transformers`' GPT-2 of the same shape after the case that it belongs to: compiled, with
SDPA attention, fused AdamW and autocast. It needs torch and transformers; the rest needs jax, flax and optax alone.
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

from train_step_cases import MODELS, Case, sweep

from crystallm_jax.files import new_file

HERE = Path(__file__).resolve().parent
# Time that a case gets at most, and what must be left to begin one before any was seen.
CASE_S, FIRST_CASE_S = 300.0, 60.0
TOKENS_PER_STEP = {"gpu": 262_144, "tpu": 262_144, "cpu": 1}
CHOICES: Mapping[str, Callable[[str], object]] = {
    "batch_size": int,
    "remat": str,
    "attention": str,
    "dtype": str,
    "layers": str,
    "windows": str,
    "dropout": float,
    "attention_dropout": float,
}
FORMATS = {
    "framework": "{:5}",
    "model": "{:5}",
    "batch_size": "{:>5}",
    "remat": "{:5}",
    "attention": "{:9}",
    "dtype": "{:8}",
    "layers": "{:8}",
    "windows": "{:7}",
    "dropout": "{:>7}",
    "attention_dropout": "{:>7}",
}
HEAD = (
    "made  model batch remat attention dtype    layers   windows dropout  of att"
    "   tokens/s    MFU  × torch  memory  compile"
)


class ChildFailedError(Exception):
    """A case's process failed; the message is why, in one line."""


def start_child(script: str, job: Mapping[str, object], limit_s: float) -> dict[str, Any]:
    """Run a helper script on a job and return what it prints.

    Raises:
        ChildFailedError: it ended with an error.
        subprocess.TimeoutExpired: it took longer than that.
    """
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    # A compile time from a cache would be none.
    hidden = ("JAX_COMPILATION_CACHE_DIR",)
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **env, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(HERE / script), json.dumps(job)],
        env=env,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    if done.returncode != 0:
        raise ChildFailedError(reason(done.returncode, done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def reason(code: int, stderr: str) -> str:
    """Why a process failed, from what it wrote."""
    if code < 0:
        return f"killed by signal {-code}" + (", as for want of memory" if code == -9 else "")
    if "RESOURCE_EXHAUSTED" in stderr or "out of memory" in stderr.lower():
        return "out of memory"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":", 1)[0]]
    return (errors or lines or ["no message"])[-1][:200]


def finished(row: Mapping[str, Any], rounds: int) -> bool:
    """Whether a row needs no more runs."""
    return bool(row.get("reason")) or row.get("rounds", 0) >= rounds


def add_round(row: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Add what a process measured to its case's row."""
    row["rounds"] = row.get("rounds", 0) + 1
    row["runs"] = [*row.get("runs", []), *found["tokens_per_s"]]
    row["tokens_per_s"] = statistics.median(row["runs"])
    row |= {name: value for name, value in found.items() if name not in ("tokens_per_s", "versions")}


def compare(report: dict[str, Any]) -> None:
    """Add to every row its utilisation and how many times its peer it is."""
    rows = {json.dumps(row["case"], sort_keys=True): row for row in report["rows"]}
    for row in report["rows"]:
        if "tokens_per_s" not in row:
            continue
        case = Case(**row["case"])
        peak = report["peak_flops"][case.dtype]
        cost = report["models"][case.model]["flops_per_token"]
        row["mfu"] = None if peak is None else row["tokens_per_s"] * cost / peak
        peer = rows.get(json.dumps(case.peer().describe(), sort_keys=True))
        if case.framework == "jax" and peer is not None and "tokens_per_s" in peer:
            row["times_torch"] = row["tokens_per_s"] / peer["tokens_per_s"]


def line_of(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    names = " ".join(form.format(str(row["case"][name])) for name, form in FORMATS.items())
    if row.get("reason"):
        return f"{names}   {row['reason']}"
    mfu = "" if row.get("mfu") is None else f"{row['mfu']:.1%}"
    times = f"{row['times_torch']:.2f}" if "times_torch" in row else ""
    memory = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB"
    return f"{names} {row['tokens_per_s']:10,.0f} {mfu:>6} {times:>8} {memory:>8} {row['compile_s']:6.1f} s"


def summary(report: Mapping[str, Any]) -> list[str]:
    """The best of each model in each precision, and against the best of its peer."""
    lines = []
    measured = [row for row in report["rows"] if "tokens_per_s" in row]
    groups = sorted({(row["case"]["model"], row["case"]["dtype"]) for row in measured})
    for model, dtype in groups:
        best = {
            framework: max(
                (
                    row["tokens_per_s"]
                    for row in measured
                    if (row["case"]["model"], row["case"]["dtype"]) == (model, dtype)
                    and row["case"]["framework"] == framework
                ),
                default=None,
            )
            for framework in ("jax", "torch")
        }
        if best["jax"] is not None and best["torch"] is not None:
            lines.append(
                f"{model}, {dtype}: {best['jax']:,.0f} tokens/s at best, {best['jax'] / best['torch']:.2f} times the"
                f" best of PyTorch, {best['torch']:,.0f}"
            )
        elif best["jax"] is not None:
            lines.append(f"{model}, {dtype}: {best['jax']:,.0f} tokens/s at best")
    return lines


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report whole."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")


def opened(path: Path, probe: Mapping[str, Any]) -> dict[str, Any]:
    """The report to go on with, or a new one; of another device or other versions it is refused."""
    if not path.exists():
        return {**probe, "environment": environment(), "rows": []}
    report = json.loads(path.read_text())
    for name, here in (
        ("device", probe["device"]),
        ("versions", probe["versions"]),
        ("environment", environment()),
    ):
        if report[name] != here:
            raise SystemExit(
                f"{path}: measured with {name} {report[name]}, here it is {here}; give another --out"
            )
    report["models"] |= probe["models"]
    return report


def environment() -> dict[str, str]:
    """Variables that change what is measured."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_", "LIBTPU_", "TORCHINDUCTOR_")) or name == "OMP_NUM_THREADS"
    }


def job_of(case: Case, settings: argparse.Namespace, platform: str) -> dict[str, object]:
    """What a case's process is asked."""
    sequence = MODELS[case.model]["block_size"]
    tokens = settings.tokens_per_step or TOKENS_PER_STEP[platform]
    return {
        "case": case.describe(),
        "micro_batches": max(1, tokens // (case.batch_size * sequence)),
        "seconds": settings.seconds,
        "runs": settings.runs,
    }


def measure_all(
    cases: list[Case], report: dict[str, Any], settings: argparse.Namespace, deadline: float
) -> int:
    """Measure what the report lacks until the time is over; returns how many processes are left to run."""
    rows = {json.dumps(row["case"], sort_keys=True): row for row in report["rows"]}
    turns = [(wanted, case) for wanted in range(1, settings.rounds + 1) for case in cases]
    longest = FIRST_CASE_S
    for number, (wanted, case) in enumerate(turns):
        row = rows.setdefault(json.dumps(case.describe(), sort_keys=True), {"case": case.describe()})
        if finished(row, wanted):
            continue
        begun = time.monotonic()
        left = deadline - begun
        if left < longest or not measure_one(case, row, report, settings, min(CASE_S, left)):
            return len(turns) - number
        longest = max(time.monotonic() - begun, 0.0 if longest == FIRST_CASE_S else longest)
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
    impossible = case.why_not(report["platform"])
    if impossible is not None:
        row["reason"] = impossible
        return True
    job = job_of(case, settings, report["platform"])
    script = "train_step_torch.py" if case.framework == "torch" else "train_step_jax.py"
    try:
        found = start_child(script, job, limit_s)
    except ChildFailedError as error:
        row["reason"] = str(error)
    except subprocess.TimeoutExpired:
        if limit_s < CASE_S:
            return False
        row["reason"] = f"did not end in {limit_s:.0f} s"
    else:
        row["micro_batches"] = job["micro_batches"]
        add_round(row, found)
        report["versions_of_peer"] = found.get("versions") or report.get("versions_of_peer")
    return True


def listed(kind: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """A parser of values of a kind, separated by commas."""

    def values(text: str) -> tuple[object, ...]:
        return tuple(kind(part) for part in text.split(","))

    return values


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", help="of small,large, by commas (both; on a CPU small alone)", default=None
    )
    parser.add_argument("--peer", choices=["torch"], help="measure the same model there too")
    for name in CHOICES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag,
            type=listed(CHOICES[name]),
            help="values to try, by commas, the best guess first",
        )
    parser.add_argument(
        "--differences", type=int, default=1, help="settings that differ from the best guess (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this call (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds a run (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs a process; the median counts (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="processes a case, in turns (%(default)s; 2 on a busy machine)"
    )
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        default=0,
        help="micro-batches are added up to so many tokens (262,144; on a CPU one micro-batch)",
    )
    parser.add_argument("--profile", type=Path, help="folder for a trace of the first case, instead")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_train_step.json"), help="JSON (%(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, print a table and write JSON."""
    settings = parse()
    try:
        return sweep_here(settings, time.monotonic() + 60 * settings.minutes)
    except (ChildFailedError, subprocess.TimeoutExpired) as error:
        # Of the probe or of a trace: a case's is in its row.
        print(f"benchmarks/train_step.py: no measurement is possible here: {error}", file=sys.stderr)
        return 1


def sweep_here(settings: argparse.Namespace, deadline: float) -> int:
    """Look what machine this is, and measure what the settings ask."""
    found = start_child("train_step_jax.py", {"probe": list(MODELS)}, CASE_S)
    platform = "gpu" if found["platform"] in ("gpu", "cuda", "rocm") else found["platform"]
    found["platform"] = platform
    models = (settings.models or ("small" if platform == "cpu" else "small,large")).split(",")
    if not set(models) <= set(MODELS):
        print(f"--models {settings.models}: there are {', '.join(MODELS)}", file=sys.stderr)
        return 2
    given = {name: getattr(settings, name) for name in CHOICES if getattr(settings, name) is not None}
    cases = sweep(platform, models, given, differences=settings.differences, peer=settings.peer == "torch")
    if settings.profile is not None:
        job = {**job_of(cases[0], settings, platform), "profile": str(settings.profile.resolve())}
        start_child("train_step_jax.py", job, CASE_S)
        print(f"{settings.profile}: a trace of {cases[0].describe()}; open it with xprof or Perfetto")
        return 0
    report = opened(settings.out, found)
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
