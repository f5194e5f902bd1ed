"""What constraints cost and gain with a trained model, and how many valid structures come a second.

    python benchmarks/sampling_trained.py [--model default] [--constrain none,symmetry,positions] [--valid]
    python benchmarks/sampling_trained.py --prompts FILE --num-samples 4 --rounds 5

The same prompts and seeds are sampled without and with each constraint, in turns; a first run of each, which compiles,
does not count. Rates are medians over the rounds, of generated tokens (forced ones too) and of structures that came to
their end. With `--valid` the texts go to the validator's processes while the model goes on, and the time ends with the
last verdict: `valid structures/s` is of that time, the other columns of sampling alone. Times of one structure differ
between levels, for the texts do.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from sampling_jax import CompileClock
from train_step import listed, write

from crystallm_jax.api import CrystalModel, load_model
from crystallm_jax.cif import make_prompt
from crystallm_jax.errors import CrystallmError
from crystallm_jax.evaluation import ValidatorPool
from crystallm_jax.samples import Sample
from crystallm_jax.sampling.devices import use_all_cores
from crystallm_jax.sampling.prompt_files import read_prompts
from crystallm_jax.sampling.requests import GenerationRequest

LEVELS = ("none", "syntax", "composition", "symmetry", "positions")
# One of each of the common families: halides, oxides, intermetallics, semiconductors, a few with four elements.
COMPOSITIONS = (
    "Na4Cl4",
    "Cs1Pb1Br3",
    "Ca4F8",
    "Mg4O4",
    "Ti2O4",
    "Sr1Ti1O3",
    "Mg8Al16O32",
    "Li4Co4O8",
    "Ga4As4",
    "Zn2S2",
    "Mo2S4",
    "Bi6Te9",
    "Ni4Al12",
    "Fe2B2",
    "K2Na1Al1F6",
    "Li4Fe4P4O16",
)


def request_of(level: str, options: argparse.Namespace, *, seed: int) -> GenerationRequest:
    """How the model is asked for samples that are held to a level, or to nothing: `none`."""
    return GenerationRequest(
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        seed=seed,
        constrain=None if level == "none" else level,  # type: ignore[arg-type]
    )


def run(
    model: CrystalModel,
    prompts: Sequence[str],
    request: GenerationRequest,
    judge: Callable[[Sample], Any] | None,
) -> dict[str, float]:
    """Sample all once: tokens, structures that came to their end, valid ones, and seconds."""
    given = [len(model.tokenizer.encode_cif(prompt)) for prompt in prompts]
    tokens = finished = samples = 0
    verdicts = []
    begun = time.perf_counter()
    for batch in model.generate_batches(prompts, request):
        for sample in batch:
            samples += 1
            tokens += len(sample.token_ids) - given[sample.prompt_index]
            finished += sample.finished
            if judge is not None:
                verdicts.append(judge(sample))
    found = {
        "samples": samples,
        "tokens": tokens,
        "finished": finished,
        "seconds": time.perf_counter() - begun,
    }
    if judge is not None:
        found["valid"] = sum(verdict.result().valid for verdict in verdicts)
        found["seconds_with_verdicts"] = time.perf_counter() - begun
    return found


def reduced(level: str, runs: Sequence[dict[str, float]], compile_s: float, late: int) -> dict[str, Any]:
    """A row of the report from a level's runs."""

    def median(amount: str, seconds: str) -> float:
        return statistics.median(one[amount] / one[seconds] for one in runs)

    row: dict[str, Any] = {
        "constrain": level,
        "tokens_per_s": median("tokens", "seconds"),
        "finished_per_s": median("finished", "seconds"),
        "finished": sum(one["finished"] for one in runs) / sum(one["samples"] for one in runs),
        "tokens_per_sample": sum(one["tokens"] for one in runs) / sum(one["samples"] for one in runs),
        "compile_s": compile_s,
        "compilations_in_runs": late,
        "runs": list(runs),
    }
    if "valid" in runs[0]:
        row["valid"] = sum(one["valid"] for one in runs) / sum(one["samples"] for one in runs)
        row["valid_per_s"] = median("valid", "seconds_with_verdicts")
    return row


def measure(
    model: CrystalModel,
    prompts: Sequence[str],
    levels: Sequence[str],
    *,
    options: argparse.Namespace,
    judge: Callable[[Sample], Any] | None,
) -> list[dict[str, Any]]:
    """Warm up, then sample in turns; the seeds are those of the rounds, the same for every level."""
    clock = CompileClock()
    runs: dict[str, list[dict[str, float]]] = {level: [] for level in levels}
    compile_s, late = dict.fromkeys(levels, 0.0), dict.fromkeys(levels, 0)
    for turn in range(options.rounds + 1):
        for level in levels:
            seconds, compilations = clock.seconds, clock.compilations
            request = request_of(level, options, seed=max(turn - 1, 0) + options.seed)
            found = run(model, prompts, request, judge)
            if turn == 0:
                compile_s[level] = clock.seconds - seconds
            else:
                runs[level].append(found)
                late[level] += clock.compilations - compilations
    return [reduced(level, runs[level], compile_s[level], late[level]) for level in levels]


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row its rate over that of the first."""
    for row in rows:
        row["times_first"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    valid = f"{row['valid']:8.1%} {row['valid_per_s']:8.2f}" if "valid" in row else f"{'':8} {'':8}"
    late = "" if not row["compilations_in_runs"] else f" +{row['compilations_in_runs']} in runs"
    return (
        f"{row['constrain']:12} {row['tokens_per_s']:9,.0f} {row['times_first']:8.2f}"
        f" {row['tokens_per_sample']:13.0f} {row['finished']:8.1%} {row['finished_per_s']:10.2f} {valid}"
        f" {row['compile_s']:6.1f} s{late}"
    )


HEAD = "constrain     tokens/s  × first tokens/sample finished finished/s    valid  valid/s  compile"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="name, folder or checkpoint (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(%(default)s)")
    parser.add_argument("--prompts", type=Path, help="CSV, text or prepared folder (16 common compositions)")
    parser.add_argument("--limit", type=int, help="take so many of the prompts, from the first")
    parser.add_argument("--num-samples", type=int, default=4, help="samples a prompt (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows decoded together (%(default)s)")
    parser.add_argument(
        "--constrain", type=listed(str), default=LEVELS, help=f"of {','.join(LEVELS)}, by commas (all)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (%(default)s)")
    parser.add_argument(
        "--valid", action="store_true", help="validate what is sampled, behind the model's back"
    )
    parser.add_argument("--workers", type=int, help="processes that validate (one a core)")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_sampling_trained.json"), help="JSON")
    return parser.parse_args()


def main() -> int:
    """Measure, print a table and write JSON."""
    options = parse()
    use_all_cores(options.batch_size)
    if not set(options.constrain) <= set(LEVELS):
        print(f"--constrain {','.join(options.constrain)}: there are {', '.join(LEVELS)}", file=sys.stderr)
        return 2
    try:
        found = [prompt.text for prompt in read_prompts(options.prompts)] if options.prompts else None
        prompts = (found or [make_prompt(composition) for composition in COMPOSITIONS])[: options.limit]
        model = load_model(options.model, dtype=options.dtype)
        if options.valid:
            with ValidatorPool(options.workers) as pool:
                rows = measure(
                    model,
                    prompts,
                    options.constrain,
                    options=options,
                    judge=lambda sample: pool.submit(sample.cif),
                )
        else:
            rows = measure(model, prompts, options.constrain, options=options, judge=None)
    except CrystallmError as error:
        print(f"benchmarks/sampling_trained.py: {error}", file=sys.stderr)
        return 1
    add_ratios(rows)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, {os.cpu_count()} cores; {model.name}, {model.num_params:,} parameters, {options.dtype};"
        f" {len(prompts)} prompts × {options.num_samples}, batch {options.batch_size}, {options.rounds} rounds\n{HEAD}"
    )
    print("\n".join(line_of(row) for row in rows))
    report = {
        "device": device,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "pymatgen")},
        "parameters": model.num_params,
        "settings": {name: value if value is None else str(value) for name, value in vars(options).items()},
        "prompts": prompts,
        "rows": rows,
    }
    write(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
