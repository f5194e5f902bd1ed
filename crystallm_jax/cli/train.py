"""`crystallm train`: train a model as a YAML file and `key=value` overrides say."""

import argparse
from typing import Any

_EXAMPLE = """example:
  crystallm prepare structures.csv --out data/mine --split 0.1,0.01
  crystallm train --config tiny dataset=data/mine out_dir=runs/tiny
  crystallm train --config tiny dataset=data/mine out_dir=runs/tiny init_from=resume

Without dataset=DIR the corpus that ships with the package is prepared and used. The keys are those of the published
configurations; CONTRIBUTING.md and crystallm_jax/training/config.py describe each. Ctrl-C and SIGTERM save before
they stop.
"""


def add_parser(verbs: Any) -> None:  # noqa: ANN401 - argparse keeps the type to itself
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "train",
        help="train a model",
        description="Train a model.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file, or the name of one in configs/ (default: no file, defaults)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from crystallm_jax.config import find_config, load_config  # noqa: PLC0415 - keeps --help instant
    from crystallm_jax.training.config import TrainConfig  # noqa: PLC0415

    path = None if arguments.config is None else find_config(arguments.config)
    config = load_config(TrainConfig, path, arguments.overrides)

    from crystallm_jax.training.loop import run as train  # noqa: PLC0415 - JAX only once the settings are good

    result = train(config)
    validation = "" if result.val_loss is None else f", validation loss {result.val_loss:.4f}"
    print(f"step {result.step}: loss {result.loss:.4f}{validation}")  # noqa: T201
    print(f"next: crystallm sample --model {config.out_dir} --composition Na4Cl4 --out samples")  # noqa: T201
    return 0
