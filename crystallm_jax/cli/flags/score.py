"""Flags of `crystallm score`."""

import argparse
from typing import Any

_EXAMPLE = """\
examples:
  crystallm score mine.cif others/ --out scores.csv
  crystallm score samples.csv --model runs/mine --given nothing --out scores.csv
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "score",
        help="log-probability and perplexity of given crystals",
        description="Prepare crystals as for training (symmetrised, standardised) and say how probable the model finds"
        "\neach: a CSV row a crystal, ranked by perplexity, the least first. Whatever cannot be scored"
        "\nhas a row that says why.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help="CIFs, folders, CSV, archives: whatever `prepare` takes")
    add("--model", default="default", metavar="M", help="a model of any format (default: %(default)s)")
    add(
        "--given",
        choices=("nothing", "composition", "spacegroup"),
        default="composition",
        help="what the model is told and does not count: up to the data line, or to the space group"
        " (default: %(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    add("--out", required=True, metavar="FILE", help="the table, CSV")
    add("--json", action="store_true", help="print one JSON object (default: text)")
