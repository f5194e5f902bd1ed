"""`crystallm sample`: crystals from a model, post-processed, validated and written."""

import argparse
from collections.abc import Sequence

from crystallm_jax.cli.sample_prompts import prompts_from
from crystallm_jax.errors import ConfigError
from crystallm_jax.sampling.prompts import Prompt, unique_ids


def run(arguments: argparse.Namespace) -> int:
    """Sample; returns the exit code."""
    _check(arguments)
    prompts = unique_ids(prompts_from(arguments))
    _check_own_numbers(arguments, prompts)

    from crystallm_jax.cli.sample_run import sample  # noqa: PLC0415 - JAX only once the prompts are good

    sample(arguments, prompts)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        ConfigError: such flags.
    """
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


def _check_own_numbers(arguments: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Refuse a number of valid samples for prompts that ask for a number of samples.

    Raises:
        ConfigError: there is one.
    """
    own = next((prompt for prompt in prompts if prompt.n is not None), None)
    if own is not None and arguments.target_valid is not None:
        raise ConfigError(
            f"--target-valid does not go with prompts that say how many samples they want (n={own.n} of {own.id}):"
            " leave one of them out"
        )
