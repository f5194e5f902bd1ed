"""How `crystallm sample` samples, once it knows that what it is asked for can be had."""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from crystallm_jax.api import load_model
from crystallm_jax.cli.sample_hosts import joined
from crystallm_jax.evaluation import ValidatorPool
from crystallm_jax.model.compiler import keep_programs
from crystallm_jax.sample_run import DEFAULT_TRIES, ResultsFolder, Summary, ValidTarget, sample_into
from crystallm_jax.sampling.devices import use_all_cores
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.prompts import Prompt, excluded_ids
from crystallm_jax.sampling.requests import GenerationRequest
from crystallm_jax.signals import stop_at_once

_MOST_NAMED = 10


def sample(arguments: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Sample, and say what it came to."""
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


def _rows(prompts: Sequence[Prompt], request: GenerationRequest, target: ValidTarget | None) -> int:
    """Rows that there are to decode together."""
    wanted = sum(prompt.n or request.num_samples for prompt in prompts) if target is None else sys.maxsize
    return min(wanted, request.batch_size or wanted)


def _request(arguments: argparse.Namespace) -> GenerationRequest:
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


def _target(arguments: argparse.Namespace) -> ValidTarget | None:
    if arguments.target_valid is None:
        return None
    return ValidTarget(
        arguments.target_valid, arguments.limit_samples or DEFAULT_TRIES * arguments.target_valid
    )


def _report(summary: Summary, arguments: argparse.Namespace) -> None:
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
