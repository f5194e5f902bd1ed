"""`crystallm sample`: crystals from a model, post-processed, validated and written."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crystallm_jax.results import Summary
    from crystallm_jax.sampling.prompts import Prompt

_EXAMPLE = """examples:
  crystallm sample --composition Na4Cl4 --num-samples 8 --out samples
  crystallm sample --formula TiO2 --z 2,4 --spacegroup P4_2/mnm --out rutile
  crystallm sample --model runs/mine --prompts compositions.csv --out screened

A composition counts the atoms of the whole cell. --prompts reads a CSV with a column `composition` (and, if wanted,
`spacegroup` and `id`), a text file with a composition and, if wanted, a space group a line, or a prepared folder.
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "sample",
        help="generate, post-process and validate crystals",
        description="Generate crystals with a model.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="default",
        help="a run folder, a model folder, a published ckpt.pt, or `default`, the one in the package (default)",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--composition", metavar="C", help="of the whole cell: Na4Cl4")
    prompts.add_argument("--formula", metavar="F", help="a formula unit, NaCl; --z says how many fill a cell")
    prompts.add_argument("--prompts", metavar="FILE", help="many prompts, see below")
    prompts.add_argument(
        "--unconditional", action="store_true", help="leave even the composition to the model"
    )
    add = parser.add_argument
    add("--z", type=_whole_numbers, default=(1, 2, 3, 4), help="formula units a cell (default: 1,2,3,4)")
    add("--spacegroup", metavar="S", help="a symbol (Fm-3m) or a number (225)")
    add("--with-spacegroup", action="store_true", help="prompt the records of a prepared folder with theirs")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write: cifs/, samples.csv, structures.extxyz, run.json",
    )
    _add_settings(add)
    parser.set_defaults(run=run)


def _add_settings(add: Callable[..., Any]) -> None:
    """Add the flags that say how to sample, each with its default."""
    add("--num-samples", type=int, default=1, metavar="N", help="samples a prompt (default: %(default)s)")
    add("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    add(
        "--top-k",
        type=int,
        default=10,
        metavar="K",
        help="1 is greedy, 0 draws from all (default: %(default)s)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="most tokens to add (default: to the context's end)")
    add("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    add(
        "--batch-size", type=int, default=64, metavar="B", help="rows decoded together (default: %(default)s)"
    )
    add(
        "--overflow",
        choices=("stop", "slide"),
        default="stop",
        help="at the context's end: stop, or slide as published, slowly (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic (default: %(default)s)",
    )
    add("--workers", type=int, metavar="N", help="validating processes (default: one a usable core)")
    add(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to validate one (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Sample; returns the exit code."""
    from tqdm import tqdm  # noqa: PLC0415 - keeps --help instant

    from crystallm_jax.evaluation import ValidatorPool  # noqa: PLC0415
    from crystallm_jax.processes import terminate_as_interrupt  # noqa: PLC0415
    from crystallm_jax.sampling.prompts import unique_ids  # noqa: PLC0415

    prompts = unique_ids(_prompts(arguments)[: arguments.limit])

    from crystallm_jax.api import load_model  # noqa: PLC0415 - JAX only once the prompts are good
    from crystallm_jax.results import ResultsFolder, sample_into  # noqa: PLC0415
    from crystallm_jax.sampling.generate import GenerationRequest  # noqa: PLC0415
    from crystallm_jax.sampling.methods import SamplingMethod  # noqa: PLC0415

    request = GenerationRequest(
        method=SamplingMethod(arguments.temperature, arguments.top_k if arguments.top_k != 0 else None),
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        overflow=arguments.overflow,
    )
    model = load_model(arguments.model, dtype=arguments.dtype)
    total = len(prompts) * request.num_samples
    with (
        terminate_as_interrupt() as interruption,
        ValidatorPool(arguments.workers, arguments.time_limit) as pool,
        tqdm(total=total, unit="sample", disable=None, file=sys.stderr) as bar,
    ):
        folder = ResultsFolder(arguments.out)
        summary = sample_into(
            folder, model, prompts, request, pool=pool, on_batch=bar.update, interruption=interruption
        )
    _report(summary, arguments.out)
    return 0


def _prompts(arguments: argparse.Namespace) -> "list[Prompt]":
    from crystallm_jax.errors import ConfigError  # noqa: PLC0415
    from crystallm_jax.sampling import prompts as sources  # noqa: PLC0415

    if arguments.spacegroup is not None and (arguments.prompts or arguments.unconditional):
        raise ConfigError(
            "--spacegroup goes with --composition or --formula; in a file it stands beside each"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: must be at least 1")
    if arguments.unconditional:
        return [sources.unconditional_prompt()]
    if arguments.composition is not None:
        return [sources.composition_prompt(arguments.composition, arguments.spacegroup)]
    if arguments.formula is not None:
        return sources.formula_prompts(arguments.formula, arguments.z, arguments.spacegroup)
    return sources.read_prompts(arguments.prompts, with_spacegroup=arguments.with_spacegroup)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 1,2,4") from None


def _report(summary: "Summary", out: str) -> None:
    share = summary.valid / summary.samples if summary.samples else 0.0
    rate = summary.generated_tokens / summary.sampling_seconds if summary.sampling_seconds else 0.0
    print(f"{summary.samples} samples, {summary.valid} valid ({share:.1%})")  # noqa: T201
    for reason, count in summary.reasons.items():
        print(f"  {count:6d}  {reason}")  # noqa: T201
    print(  # noqa: T201
        f"{summary.generated_tokens} tokens in {summary.sampling_seconds:.1f} s, compilation included"
        f" ({rate:.0f} tokens/s); validated after {summary.seconds:.1f} s"
    )
    print(f"in {out}: cifs/, samples.csv, structures.extxyz, run.json")  # noqa: T201
