"""`crystallm compile`: compile the training step for a TPU slice that is not at hand, and say what it would take."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.files import new_file

if TYPE_CHECKING:
    from crystallm_jax.tpu_estimate.compile_ahead import Report
    from crystallm_jax.tpu_estimate.topology import Slice
    from crystallm_jax.train_run.train_config import TrainConfig

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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compile and report; returns the exit code.

    Raises:
        CrystallmError: no such slice, no libtpu, a mesh that does not fit, a step that does not fit the memory.
    """
    # Whatever devices this machine has, they are not what is compiled for.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from crystallm_jax.config import find_config, load_config  # noqa: PLC0415 - keeps --help instant
    from crystallm_jax.train_run.train_config import TrainConfig  # noqa: PLC0415

    if arguments.decode is not None and arguments.decode < 1:
        raise ConfigError(f"--decode {arguments.decode}: must be at least 1 row")
    path = None if arguments.config is None else find_config(arguments.config)
    config = load_config(TrainConfig, path, arguments.overrides)

    from crystallm_jax.tpu_estimate.estimate import as_dict, as_text  # noqa: PLC0415 - JAX only once the settings are good
    from crystallm_jax.tpu_estimate.topology import open_slice  # noqa: PLC0415

    placed = open_slice(arguments.topology)
    report = _compile(config, placed, arguments)
    sys.stdout.write(as_text(report))
    if arguments.json is not None:
        _write(arguments.json, as_dict(report))
    return 0


def _compile(config: "TrainConfig", placed: "Slice", arguments: argparse.Namespace) -> "Report":
    from crystallm_jax.cif import CIFTokenizer  # noqa: PLC0415
    from crystallm_jax.tpu_estimate.compile_ahead import compile_decoding, compile_training  # noqa: PLC0415
    from crystallm_jax.tpu_estimate.search import search_meshes  # noqa: PLC0415

    vocab_size = CIFTokenizer().vocab_size
    if arguments.decode is not None:
        return compile_decoding(config, vocab_size, placed, batch_size=arguments.decode)
    if arguments.mesh == "search":
        return search_meshes(config, vocab_size, placed)[0]
    return compile_training(config, vocab_size, placed)


def _write(path: Path, report: dict[str, Any]) -> None:
    with new_file(path, DataError) as partial:
        partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
