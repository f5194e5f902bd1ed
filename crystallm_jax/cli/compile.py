"""`crystallm compile`: compile the training step for a TPU slice that is not at hand, and say what it would take."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.config import find_config, load_config
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.files import new_file
from crystallm_jax.train_run.train_config import TrainConfig

if TYPE_CHECKING:
    from crystallm_jax.tpu_estimate.compile_ahead import Report
    from crystallm_jax.tpu_estimate.topology import Slice


def run(arguments: argparse.Namespace) -> int:
    """Compile and report; returns the exit code.

    Raises:
        CrystallmError: no such slice, no libtpu, a mesh that does not fit, a step that does not fit the memory.
    """
    # Whatever devices this machine has, they are not what is compiled for.
    os.environ["JAX_PLATFORMS"] = "cpu"
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


def _compile(config: TrainConfig, placed: "Slice", arguments: argparse.Namespace) -> "Report":
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
