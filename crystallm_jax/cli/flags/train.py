"""Flags of `crystallm train`."""

import argparse
from typing import Any

_EXAMPLE = """example:
  crystallm prepare structures.csv --out data/mine --split 0.1,0.01
  crystallm train --config tiny dataset=data/mine out_dir=runs/tiny
  crystallm train --config tiny dataset=data/mine out_dir=runs/tiny init_from=resume

dataset=embedded takes the corpus in the package (it is prepared into out_dir first). The keys are those of the
published configurations; crystallm_jax/train_run/train_config.py describes each. Ctrl-C and SIGTERM save first;
after SIGTERM the exit code is 75, on which a scheduler can run the command again (existing_run=resume).
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "train",
        help="train a model",
        description="Train a model.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file, or the name of one in configs/ (default: no file, defaults)",
    )
    parser.add_argument(
        "--profile",
        type=_count,
        metavar="N",
        help="trace N steps, from the tenth on, into out_dir/profile, as profile_steps=N (default: none)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)
