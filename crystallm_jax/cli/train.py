"""`crystallm train`: train a model as a YAML file and `key=value` overrides say."""

import argparse
import contextlib
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystallm_jax.data.corpus import EMBEDDED
from crystallm_jax.signals import stop_at_once

if TYPE_CHECKING:
    from crystallm_jax.probe import ValidityProbe
    from crystallm_jax.train_run.train_config import TrainConfig

# Fractions of the embedded corpus for validation and test: 3,000 crystals, some 100 of them in each.
_EMBEDDED_SPLIT = (0.04, 0.03)
# Before the steps and behind them there is nothing to save.
_BETWEEN = "stopped between steps, nothing is lost; the same command goes on (existing_run=resume)"

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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from crystallm_jax.config import find_config, load_config  # noqa: PLC0415 - keeps --help instant
    from crystallm_jax.train_run.train_config import TrainConfig  # noqa: PLC0415

    path = None if arguments.config is None else find_config(arguments.config)
    flags = [] if arguments.profile is None else [f"profile_steps={arguments.profile}"]
    config = load_config(TrainConfig, path, [*arguments.overrides, *flags])

    # JAX only once the settings are good.
    from crystallm_jax.hosts.distributed import is_writer, join, parted, wait_for_all  # noqa: PLC0415
    from crystallm_jax.training.loop import run as train  # noqa: PLC0415

    _quiet_orbax()
    with stop_at_once(_BETWEEN), contextlib.ExitStack() as stack:
        join(config)
        stack.enter_context(parted("train"))
        if config.dataset == EMBEDDED:
            if is_writer():
                _prepare_embedded(_embedded(config))
            wait_for_all("dataset=embedded")
            config = replace(config, dataset=str(_embedded(config)))
        result = train(config, probe=_probe(config, stack))
    if not is_writer():
        return 0
    losses = {"loss": result.loss, "validation loss": result.val_loss}
    known = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
    print(f"step {result.step}: {', '.join(known) or 'nothing left to do'}")  # noqa: T201
    print(f"next: crystallm sample --model {shlex.quote(config.out_dir)} --composition Na4Cl4 --out samples")  # noqa: T201
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def _probe(config: "TrainConfig", stack: contextlib.ExitStack) -> "ValidityProbe | None":
    """What samples in the middle of the run, if that is asked for."""
    if config.sample_interval == 0 or not config.dataset:
        return None
    from crystallm_jax.probe import ValidityProbe  # noqa: PLC0415 - for this alone

    return stack.enter_context(ValidityProbe(config))


def _quiet_orbax() -> None:
    """Keep orbax's reports of a failed write off the terminal: the error that it raises says it in one line.

    It logs pages of tracebacks, writes that fail after the first one find its event loop closed and print that, and
    asyncio prints those that nobody waits for any more.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def report(unraisable: Any) -> None:
        # What was still being written to a full disk, or read of a damaged checkpoint.
        known = ("Event loop is closed", "Encountered error while reading array index")
        if not str(unraisable.exc_value).startswith(known):
            others(unraisable)

    sys.unraisablehook = report


def _embedded(config: "TrainConfig") -> Path:
    return Path(config.out_dir) / "dataset"


def _prepare_embedded(folder: Path) -> None:
    """Prepare the corpus in the package into a folder of the run, unless it is there already."""
    # Here, not above: pymatgen is needed for this alone.
    from crystallm_jax.data.prepare import prepare  # noqa: PLC0415
    from crystallm_jax.data.preparing.selection import Selection  # noqa: PLC0415
    from crystallm_jax.data.preparing.splits import Split  # noqa: PLC0415

    if not (folder / "meta.json").is_file():
        report = prepare([EMBEDDED], folder, selection=Selection(split=Split(*_EMBEDDED_SPLIT)))
        print(f"embedded corpus: {report.n_kept:,} crystals, {report.n_tokens:,} tokens in {folder}")  # noqa: T201
