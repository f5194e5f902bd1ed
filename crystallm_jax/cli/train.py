"""`crystallm train`: train a model as a YAML file and `key=value` overrides say."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from crystallm_jax.data.corpus import EMBEDDED

# Fractions of the embedded corpus for validation and test: 3,000 crystals, some 100 of them in each.
_EMBEDDED_SPLIT = (0.04, 0.03)

_EXAMPLE = """example:
  crystallm prepare structures.csv --out data/mine --split 0.1,0.01
  crystallm train --config tiny dataset=data/mine out_dir=runs/tiny
  crystallm train --config tiny dataset=data/mine out_dir=runs/tiny init_from=resume

dataset=embedded takes the corpus in the package (it is prepared into out_dir first). The keys are those of the
published configurations; crystallm_jax/training/config.py describes each. Ctrl-C and SIGTERM save before they stop.
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from crystallm_jax.config import find_config, load_config  # noqa: PLC0415 - keeps --help instant
    from crystallm_jax.training.config import TrainConfig  # noqa: PLC0415

    path = None if arguments.config is None else find_config(arguments.config)
    config = load_config(TrainConfig, path, arguments.overrides)
    if config.dataset == EMBEDDED:
        config = replace(config, dataset=str(_prepare_embedded(Path(config.out_dir))))

    from crystallm_jax.training.loop import run as train  # noqa: PLC0415 - JAX only once the settings are good

    _quiet_orbax()
    result = train(config)
    losses = {"loss": result.loss, "validation loss": result.val_loss}
    known = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
    print(f"step {result.step}: {', '.join(known) or 'nothing left to do'}")  # noqa: T201
    print(f"next: crystallm sample --model {config.out_dir} --composition Na4Cl4 --out samples")  # noqa: T201
    return 0


def _quiet_orbax() -> None:
    """Keep orbax's reports of a failed write off the terminal: the error that it raises says it in one line.

    It logs pages of tracebacks, writes that fail after the first one find its event loop closed and print that, and
    asyncio prints those that nobody waits for any more.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = report


def _prepare_embedded(out_dir: Path) -> Path:
    """Prepare the corpus in the package into a run folder, unless it is there already."""
    # Here, not above: pymatgen is needed for this alone.
    from crystallm_jax.data.prepare import prepare  # noqa: PLC0415
    from crystallm_jax.data.preparing.selection import Selection  # noqa: PLC0415
    from crystallm_jax.data.preparing.splits import Split  # noqa: PLC0415

    folder = out_dir / "dataset"
    if not (folder / "meta.json").is_file():
        report = prepare([EMBEDDED], folder, selection=Selection(split=Split(*_EMBEDDED_SPLIT)))
        print(f"embedded corpus: {report.n_kept:,} crystals, {report.n_tokens:,} tokens in {folder}")  # noqa: T201
    return folder
