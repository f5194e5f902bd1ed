"""Flags of `crystallm compile`."""

import argparse
from pathlib import Path
from typing import Any

_EXAMPLE = """examples:
  crystallm compile --topology v5e:2x2 --config small
  crystallm compile --topology v5e:16x16 --config large batch_size=256 fsdp=16 gradient_accumulation_steps=4
  crystallm compile --topology v6e:4x4 --config large batch_size=64 --mesh search --json report.json

No TPU is needed, but libtpu is: pip install 'crystallm-jax[tpu]', on Linux. Topologies are v5e, v6e (two sides), v4
and v5p (three). A step that does not fit the chip's memory ends with exit code 1.
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "compile",
        help="compile for TPUs that are not at hand, and predict memory and speed",
        description="Compile the training step ahead of time for a TPU slice: memory, FLOPs, communication, a predicted"
        " step time.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="a slice, such as v5e:16x16 or v5p:4x4x4"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file, or the name of one in configs/ (default: no file, defaults)",
    )
    parser.add_argument(
        "--mesh",
        choices=["configured", "search"],
        default="configured",
        help="the configuration's mesh, or the fastest of several by prediction (default: configured)",
    )
    parser.add_argument(
        "--decode",
        type=int,
        metavar="ROWS",
        help="compile the step that decodes so many rows on one chip (tensor=N: on N chips) instead",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
