"""`crystallm sample`: crystals from a model, post-processed, validated and written."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from crystallm_jax.cli.sample_hosts import add_device_flags, joined
from crystallm_jax.cli.sample_prompts import PROMPT_HELP, add_prompt_flags, positive, prompts_from
from crystallm_jax.signals import stop_at_once

if TYPE_CHECKING:
    from crystallm_jax.sample_run import Summary, ValidTarget
    from crystallm_jax.sampling.prompts import Prompt
    from crystallm_jax.sampling.requests import GenerationRequest

_MOST_NAMED = 10

_EXAMPLE = f"""examples:
  crystallm sample --composition Na4Cl4 --num-samples 8 --out samples
  crystallm sample --formula TiO2 --z 2,4 --spacegroup P4_2/mnm --out rutile
  crystallm sample --formula NaCl --z 1,4 --spacegroup compatible --num-samples 4 --out salt
  crystallm sample --elements Li-Fe-P-O --z 1,2,4 --max-sites 60 --out system
  crystallm sample --composition Ti4O8 --target-valid 10 --constrain symmetry --out titania
  crystallm sample --model runs/mine --prompts compositions.csv --out screened

{PROMPT_HELP}"""


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
    add_prompt_flags(parser)
    add = parser.add_argument
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write: cifs/, symmetrized/, samples.csv, structures.extxyz, run.json",
    )
    _add_numbers(add)
    _add_method(add)
    _add_machine(add)
    add_device_flags(add)
    parser.set_defaults(run=run)


def _add_numbers(add: Callable[..., Any]) -> None:
    """Add the flags that say how many samples are wanted."""
    add("--num-samples", type=positive, metavar="N", help="samples a prompt (default: 1)")
    add(
        "--target-valid",
        type=positive,
        metavar="K",
        help="instead of --num-samples: go on with each prompt until K samples are valid",
    )
    add(
        "--limit-samples",
        type=positive,
        metavar="N",
        help="with --target-valid: samples a prompt at most (default: 50 K)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with what a run with these settings left in --out, if any; after SIGTERM the exit code is 75, on"
        " which a scheduler can run the command again",
    )


def _add_method(add: Callable[..., Any]) -> None:
    """Add the flags that say what is drawn, each with its default."""
    add("--temperature", type=_temperature, default=1.0, metavar="T", help="default: %(default)s")
    add(
        "--top-k",
        type=_natural,
        default=10,
        metavar="K",
        help="1 is greedy, 0 draws from all (default: %(default)s)",
    )
    add(
        "--top-p",
        type=_share,
        metavar="P",
        help="of these, draw from the fewest whose probabilities add up to P (default: from all)",
    )
    add(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="most tokens to add (default: to the context's end)",
    )
    add("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    add(
        "--constrain",
        choices=("syntax", "composition", "symmetry", "positions"),
        help="hold every sample to the dialect's syntax, to the prompt's composition too, to multiplicities that"
        " the space group has as well, or also to places and distances of its atoms (default: to nothing, as"
        " published)",
    )
    add(
        "--overflow",
        choices=("stop", "slide"),
        default="stop",
        help="at the context's end: stop, or slide as published, slowly (default: %(default)s)",
    )


def _add_machine(add: Callable[..., Any]) -> None:
    """Add the flags that say how the machine is used."""
    add(
        "--batch-size",
        type=positive,
        metavar="B",
        help="rows decoded together; it changes no sample (default: 64 on a CPU, 512 elsewhere)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic (default: %(default)s)",
    )
    add(
        "--cache-dtype",
        choices=("float32", "bfloat16"),
        help="of the keys and values kept (default: as --dtype)",
    )
    add("--workers", type=positive, metavar="N", help="validating processes (default: one a usable core)")
    add(
        "--time-limit",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds to validate one (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Sample; returns the exit code."""
    from tqdm import tqdm  # noqa: PLC0415 - keeps --help instant

    from crystallm_jax.evaluation import ValidatorPool  # noqa: PLC0415
    from crystallm_jax.sampling.prompts import unique_ids  # noqa: PLC0415

    _check(arguments)
    prompts = unique_ids(prompts_from(arguments))
    _check_own_numbers(arguments, prompts)

    from crystallm_jax.api import load_model  # noqa: PLC0415 - JAX only once the prompts are good
    from crystallm_jax.model.compiler import keep_programs  # noqa: PLC0415
    from crystallm_jax.sample_run import ResultsFolder, sample_into  # noqa: PLC0415
    from crystallm_jax.sampling.devices import use_all_cores  # noqa: PLC0415

    request, target = _request(arguments), _target(arguments)
    use_all_cores(_rows(prompts, request, target))
    with stop_at_once() as stop, joined(arguments) as part:
        keep_programs()
        model = load_model(arguments.model, dtype=arguments.dtype)
        own = [prompt for index, prompt in enumerate(prompts) if part.has(index)]
        with (
            ValidatorPool(arguments.workers, arguments.time_limit) as pool,
            tqdm(
                total=None if target else sum(prompt.n or request.num_samples for prompt in own),
                unit="sample",
                disable=True if part.number else None,
                file=sys.stderr,
            ) as bar,
        ):
            summary = sample_into(
                ResultsFolder(arguments.out, part=part.number, parts=part.count, resume=arguments.resume),
                model,
                prompts,
                request,
                pool=pool,
                target=target,
                on_batch=bar.update,
                stop=stop,
                barrier=part.barrier,
            )
    if summary is not None:
        _report(summary, arguments)
    return 0


def _rows(prompts: "Sequence[Prompt]", request: "GenerationRequest", target: "ValidTarget | None") -> int:
    """Rows that there are to decode together."""
    wanted = sum(prompt.n or request.num_samples for prompt in prompts) if target is None else sys.maxsize
    return min(wanted, request.batch_size or wanted)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        ConfigError: such flags.
    """
    from crystallm_jax.errors import ConfigError  # noqa: PLC0415

    target, limit = arguments.target_valid, arguments.limit_samples
    if limit is not None and target is None:
        raise ConfigError("--limit-samples goes with --target-valid; for a fixed number give --num-samples")
    if target is not None and arguments.num_samples is not None:
        raise ConfigError(
            "--target-valid and --num-samples do not go together; for a limit give --limit-samples"
        )
    if limit is not None and limit < target:
        raise ConfigError(f"--limit-samples {limit} is below --target-valid {target}: raise it")
    if target is not None and arguments.overflow == "slide":
        raise ConfigError("--target-valid does not go with --overflow slide: use --overflow stop")
    if arguments.constrain is not None and arguments.overflow == "slide":
        raise ConfigError(
            "--constrain does not go with --overflow slide: what is forced must fit the context"
        )


def _check_own_numbers(arguments: argparse.Namespace, prompts: "Sequence[Prompt]") -> None:
    """Refuse a number of valid samples for prompts that ask for a number of samples.

    Raises:
        ConfigError: there is one.
    """
    from crystallm_jax.errors import ConfigError  # noqa: PLC0415

    own = next((prompt for prompt in prompts if prompt.n is not None), None)
    if own is not None and arguments.target_valid is not None:
        raise ConfigError(
            f"--target-valid does not go with prompts that say how many samples they want (n={own.n} of {own.id}):"
            " leave one of them out"
        )


def _request(arguments: argparse.Namespace) -> "GenerationRequest":
    from crystallm_jax.sampling.methods import SamplingMethod  # noqa: PLC0415
    from crystallm_jax.sampling.prompts import excluded_ids  # noqa: PLC0415
    from crystallm_jax.sampling.requests import GenerationRequest  # noqa: PLC0415

    return GenerationRequest(
        method=SamplingMethod(
            temperature=arguments.temperature,
            top_k=arguments.top_k or None,
            top_p=arguments.top_p,
            excluded=excluded_ids(arguments.exclude_elements),
        ),
        num_samples=arguments.num_samples or 1,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        overflow=arguments.overflow,
        constrain=arguments.constrain,
        cache_dtype=arguments.cache_dtype,
        tensor=arguments.tensor,
    )


def _target(arguments: argparse.Namespace) -> "ValidTarget | None":
    from crystallm_jax.sample_run import DEFAULT_TRIES, ValidTarget  # noqa: PLC0415

    if arguments.target_valid is None:
        return None
    return ValidTarget(
        arguments.target_valid, arguments.limit_samples or DEFAULT_TRIES * arguments.target_valid
    )


def _report(summary: "Summary", arguments: argparse.Namespace) -> None:
    totals, session, out = summary.totals, summary.session, arguments.out
    if session.found and not session.samples:
        print(f"{out}: all its samples are there already, nothing to do")  # noqa: T201
    share = totals.valid / totals.samples if totals.samples else 0.0
    print(f"{totals.samples} samples, {totals.valid} valid ({share:.1%})")  # noqa: T201
    for reason, count in totals.reasons.items():
        print(f"  {count:6d}  {reason}")  # noqa: T201
    if summary.short:
        named = ", ".join(summary.short[:_MOST_NAMED])
        more = f" and {len(summary.short) - _MOST_NAMED:,} more" if len(summary.short) > _MOST_NAMED else ""
        print(f"fewer than {arguments.target_valid} valid after the most samples allowed: {named}{more}")  # noqa: T201
    if session.samples:
        found = f"; {session.found} samples were there already" if session.found else ""
        print(  # noqa: T201
            f"{session.generated_tokens} tokens in {session.sampling_seconds:.1f} s, compilation included"
            f" ({session.tokens_per_second:.0f} tokens/s); validated after {session.seconds:.1f} s{found}"
        )
    print(f"in {out}: cifs/, symmetrized/, samples.csv, structures.extxyz, run.json")  # noqa: T201


def _natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 4294967295")
    return int(text)


def _temperature(text: str) -> float:
    return _number(text, "a number above 0; for the most likely token use --top-k 1")


def _seconds(text: str) -> float:
    return _number(text, "a number of seconds above 0")


def _share(text: str) -> float:
    value = _number(text, "a share above 0 and at most 1")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share above 0 and at most 1")
    return value


def _number(text: str, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value
