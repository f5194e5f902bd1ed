"""Flags of `crystallm info`."""

import argparse
from pathlib import Path

_EXAMPLE = """\
examples:
  crystallm info data/mine
  crystallm info data/mine --plot lengths.png
  crystallm info data/mine --json | jq .splits.train.elements.Na
  crystallm info runs/mine
  crystallm info runs/mine --json | jq .best_val_loss
  crystallm info models/mine
  crystallm info default
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "info",
        help="what a prepared folder or a model holds, and whether it is whole; where a training run stands",
        description="Describe a prepared folder or a model and verify it; exits with 1 if anything is wrong with it. "
        "Or describe a run folder, while it is written to, too, and draw its curves.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        metavar="WHAT",
        help="a prepared folder, or published token files or their archive; a model: a file or folder of any format, "
        "a name, or one of a run's checkpoints; or a run folder",
    )
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object (default: as text)")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="compare no checksums but those of parameters (default: compare all)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the lengths, or the run's curves, as .png, .pdf or .svg (default: no lengths; curves.png in the "
        "run folder; models have no picture)",
    )
    return parser
