"""`crystallm train`: train a model as a YAML file and `key=value` overrides say."""

import argparse

from crystallm_jax.config import find_config, load_config
from crystallm_jax.train_run.train_config import TrainConfig


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    path = None if arguments.config is None else find_config(arguments.config)
    flags = [] if arguments.profile is None else [f"profile_steps={arguments.profile}"]
    config = load_config(TrainConfig, path, [*arguments.overrides, *flags])

    from crystallm_jax.cli.train_run import train  # noqa: PLC0415 - JAX only once the settings are good

    train(config)
    return 0
