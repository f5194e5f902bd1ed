"""Flags of `crystallm convert`."""

import argparse
from pathlib import Path
from typing import Any

_EXAMPLE = """examples:
  crystallm convert ckpt.pt models/mine                     a published checkpoint as a model folder
  crystallm convert runs/mine mine.pt                       back, with the optimiser's moments, to train on there
  crystallm convert runs/mine models/mine --license cc-by-4.0 --data "my crystals, CC BY 4.0"
  crystallm convert default model.npz --dtype int8          for NumPy alone
  crystallm convert runs/mine models/hf --to huggingface --push me/crystals

SOURCE is a run folder, one of a run's checkpoints, a model folder, a Hugging Face folder, ckpt.pt, model.npz,
hf:OWNER/NAME, the name of a published model (`crystallm download --list`), or `default`.
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "convert",
        help="a model from any format to any other: folders, ckpt.pt, NumPy, Hugging Face",
        description="Write a model in another format. Nothing that is there already is written over.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the model, of any format (below)")
    add("target", metavar="TARGET", type=Path, help="file or folder to write, which is not there yet")
    add(
        "--to",
        choices=("folder", "published", "numpy", "huggingface"),
        help="the format (default: by TARGET's name: .pt published, .npz numpy, else folder)",
    )
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "int8"),
        default="float32",
        help="storage of the parameters (default: %(default)s; ckpt.pt holds no other, int8 is for .npz alone)",
    )
    add(
        "--storage",
        choices=("safetensors", "orbax"),
        default="safetensors",
        help="of a model folder's parameters (default: %(default)s)",
    )
    add(
        "--weights-only",
        action="store_true",
        help="leave the optimiser's moments out (default: they go along into folders and ckpt.pt)",
    )
    _add_card(parser.add_argument_group("the model card, of folders"))
    hub = parser.add_argument_group("the hub")
    hub.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder that was written to the Hugging Face hub (default: it stays here)",
    )
    hub.add_argument(
        "--private",
        action="store_true",
        help="with --push: make the repository private where it is new (default: public)",
    )


def _add_card(group: Any) -> None:
    add = group.add_argument
    add("--license", metavar="ID", help="of the weights, such as cc-by-4.0 (default: as the source says)")
    add("--data", metavar="TEXT", help="what it was trained on, with credits (default: as the source says)")
    add("--command", metavar="TEXT", help="that trained it (default: as the source says)")
    add(
        "--metric",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=_metric,
        help="a measured figure; may be given several times (default: as the source says)",
    )
    add(
        "--notes",
        metavar="FILE",
        type=Path,
        help="Markdown below the head of the card (default: as the source has it, or made of the rest)",
    )


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=NUMBER")
