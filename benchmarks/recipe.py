"""Which recipe trains best: small models, one change at a time from a base, at equal tokens and at equal seconds.

    python benchmarks/recipe.py --dataset data/mp_123k [--tokens 1600000] [--out FILE]
    python benchmarks/recipe.py --dataset data/mp_123k --speed          first, on a machine that does nothing else
    python benchmarks/recipe.py --list

Each run is a process of its own, on one core, as many at once as there are cores: losses do not depend on what else the
machine does. Speeds do: `--speed` times the steps of every case in turn, on all cores. With them the runs that are to
take as long as the base know how many steps they have. What has been run stands in the JSON, with a picture beside it,
and the same command goes on. Losses are nats a token over the first 300 files of the validation set, each from position
0, of the last weights.

`as published, torch` is `transformers`' GPT-2 in PyTorch, on our run's batches, from its weights; it needs both.
"""

import argparse
import concurrent.futures
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from recipe_cases import BASE, SHAPE, Case, cases

from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError
from crystallm_jax.files import new_file

HERE = Path(__file__).resolve().parent
ROUNDS, STEPS = 3, 6
KEPT_LOSSES = 20


def start_child(script: str, job: Mapping[str, object]) -> dict[str, Any]:
    """Run a helper script on a job and return what it prints.

    Raises:
        SystemExit: it failed.
    """
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(HERE / script), json.dumps(job)],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{script} failed: {done.stderr.strip()[-600:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cut_short(dataset: Path, tokens: int, folder: Path) -> Path:
    """The first records of a data set, that many tokens of them, as a data set of their own."""
    if not (folder / "meta.json").is_file():
        store = TokenStore.open(dataset)
        count = int(np.searchsorted(np.asarray(store.starts), tokens))
        with StoreWriter(folder) as out:
            for number in range(count):
                out.add(str(number), store.record(number), split="train")
            out.commit(sources=(), options={"first": count}, counts={}, versions={})
    return folder


def speed_name(case: Case) -> str:
    """What cases of equal speed share: shape, batch, optimiser and what else a step computes."""
    merged = {**BASE, **case.changes}
    shape = {"optimizer": merged["optimizer"], "batch_size": merged["batch_size"]}
    shape |= {key: merged[key] for key in SHAPE} | {"windows": merged["windows"]}
    shape |= {"dropout": merged["dropout"], "average": bool(merged.get("ema_decay"))}
    return json.dumps(shape, sort_keys=True)


def measure_speeds(report: dict[str, Any], dataset: Path, wanted: Iterable[Case], tokens: int) -> None:
    """Time every kind of step that is not timed yet: a median over rounds, one kind after the other."""
    for case in wanted:
        name = speed_name(case)
        if case.framework != "jax" or name in report["speeds"]:
            continue
        job = {"settings": case.settings(tokens=tokens), "dataset": str(dataset)}
        found = start_child("recipe_jax.py", {**job, "speed": {"rounds": ROUNDS, "steps": STEPS}})
        rate = found["tokens_per_step"] / statistics.median(found["step_s"])
        report["speeds"][name] = {"tokens_per_s": rate, **found}
        print(f"{rate:8,.0f} tokens/s  {case.name}", flush=True)


def run_case(
    case: Case, report: Mapping[str, Any], settings: argparse.Namespace, core: int
) -> dict[str, Any]:
    """Train one case on one core."""
    dataset = settings.dataset
    if case.repeats > 1:
        dataset = cut_short(
            dataset, settings.tokens // case.repeats, settings.work / f"repeated {case.repeats}"
        )
    speed = 1.0
    if case.seconds:
        base = report["speeds"][speed_name(Case("base"))]["tokens_per_s"]
        speed = report["speeds"][speed_name(case)]["tokens_per_s"] / base
    job = {
        "settings": case.settings(tokens=settings.tokens, speed=speed),
        "dataset": str(dataset),
        "val_dataset": str(settings.dataset),
        "out_dir": str(settings.work / case.key),
        "core": core,
    }
    found = start_child(f"recipe_{case.framework}.py", job)
    every = max(1, len(found["train_losses"]) // KEPT_LOSSES)
    found["train_losses"] = found["train_losses"][every - 1 :: every]
    return {"settings": job["settings"], **found}


def run_all(wanted: list[Case], report: dict[str, Any], settings: argparse.Namespace) -> None:
    """Train what is left, a case a core, and write the report after each."""
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def on_a_core(case: Case) -> dict[str, Any]:
        core = cores.get()
        try:
            return run_case(case, report, settings, core)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        running = {pool.submit(on_a_core, case): case for case in wanted}
        try:
            for done in concurrent.futures.as_completed(running):
                case = running[done]
                report["runs"][case.key] = done.result()
                write(settings.out, report)
                print(f"{report['runs'][case.key]['val_loss']:.4f}  {case.key}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report whole."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")


def opened(settings: argparse.Namespace) -> dict[str, Any]:
    """The report to go on with, or a new one; of another base, length or data it is refused."""
    about = {
        "base": dict(BASE),
        "tokens": settings.tokens,
        "dataset": TokenStore.open(settings.dataset).header.splits["train"].sha256,
    }
    if settings.out.exists():
        report = dict(json.loads(settings.out.read_text()))
        if {key: report.get(key) for key in about} != about:
            raise SystemExit(f"{settings.out}: of another base, --tokens or data set; give another --out")
        return report
    versions = {name: version(name) for name in ("jax", "flax", "optax", "numpy")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {**about, "versions": versions, "machine": machine, "speeds": {}, "runs": {}}


def table(report: Mapping[str, Any]) -> Iterable[str]:
    """A line a case: loss by seed, difference from the base, average's loss, tokens, speed."""
    runs, by_name = report["runs"], {}
    for case in cases():
        if case.key in runs:
            name = f"{case.name}{', equal seconds' if case.seconds else ''}"
            by_name.setdefault(f"{name}{', torch' if case.framework == 'torch' else ''}", []).append(case)
    base = [runs[case.key]["val_loss"] for case in by_name.get("base", [])]
    yield f"{'case':44} {'tokens':>10} {'loss':>7} {'by seed':>15} {'to base':>8} {'average':>8} {'tokens/s':>9}"
    for name, same in by_name.items():
        losses = [runs[case.key]["val_loss"] for case in same]
        mean, first = statistics.mean(losses), runs[same[0].key]
        seeds = " ".join(f"{loss:.4f}" for loss in losses) if len(losses) > 1 else ""
        against = f"{mean - statistics.mean(base):+.4f}" if base else ""
        average = first.get("average_val_loss")
        speed = report["speeds"].get(speed_name(same[0])) if same[0].framework == "jax" else None
        rate = f"{speed['tokens_per_s']:,.0f}" if speed else ""
        yield (
            f"{name:44} {first['tokens']:10,} {mean:7.4f} {seeds:>15} {against:>8}"
            f" {'' if average is None else format(average, '.4f'):>8} {rate:>9}"
        )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Training losses over tokens, a line a run, and validation losses, best first."""
    mpl.use("Agg")
    runs = sorted(report["runs"].items(), key=lambda named: named[1]["val_loss"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.95, len(runs)))
    for colour, (_, run) in zip(colours, runs, strict=True):
        steps, losses = np.array(run["train_losses"]).T
        left.plot(steps * run["tokens"] / run["steps"] / 1000, losses, color=colour)
    left.set(xlabel="tokens, thousands", ylabel="training loss, nats a token", ylim=(0.9, 4))
    right.scatter([run["val_loss"] for _, run in runs], range(len(runs)), c=colours)
    right.set(xlabel="validation loss of whole files, nats a token", yticks=range(len(runs)))
    right.set_yticklabels([name for name, _ in runs], fontsize=8)
    right.invert_yaxis()
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, default=Path("data/mp_123k"), help="prepared, with a val set")
    parser.add_argument("--tokens", type=int, default=409_600, help="that a run reads (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases whose names hold one of these, separated by |")
    parser.add_argument("--speed", action="store_true", help="time the steps, and train nothing")
    parser.add_argument("--list", action="store_true", help="print the table so far")
    parser.add_argument("--work", type=Path, default=Path("runs/recipe"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recipe.json")
    return parser.parse_args()


def main() -> int:
    """Run what is asked for and print the table."""
    settings = parsed()
    try:
        report = opened(settings)
    except DataError as error:
        raise SystemExit(f"recipe.py: {error}") from None
    names = settings.only.split("|")
    wanted = [case for case in cases() if any(name in case.key for name in names)]
    if settings.speed:
        measure_speeds(report, settings.dataset, wanted, settings.tokens)
        write(settings.out, report)
    elif not settings.list:
        left = [case for case in wanted if case.key not in report["runs"]]
        timed = speed_name(Case("base")) in report["speeds"]
        ready = [
            case for case in left if not case.seconds or (timed and speed_name(case) in report["speeds"])
        ]
        run_all(ready, report, settings)
        if len(ready) < len(left):
            print(f"{len(left) - len(ready)} that take as long as the base wait for --speed")
    print("\n".join(table(report)))
    if report["runs"]:
        draw(report, settings.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
