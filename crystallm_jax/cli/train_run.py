"""How `crystallm train` trains, once its settings are known to be good."""

import contextlib
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from crystallm_jax.data.corpus import EMBEDDED
from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import Split
from crystallm_jax.hosts.distributed import is_writer, join, parted, wait_for_all
from crystallm_jax.probe import ValidityProbe
from crystallm_jax.signals import stop_at_once
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training import loop

# Fractions of the embedded corpus for validation and test: 3,000 crystals, some 100 of them in each.
_EMBEDDED_SPLIT = (0.04, 0.03)
# Before the steps and behind them there is nothing to save.
_BETWEEN = "stopped between steps, nothing is lost; the same command goes on (existing_run=resume)"


def train(config: TrainConfig) -> None:
    """Train, and say what it came to."""
    _quiet_orbax()
    with stop_at_once(_BETWEEN), contextlib.ExitStack() as stack:
        join(config)
        stack.enter_context(parted("train"))
        if config.dataset == EMBEDDED:
            if is_writer():
                _prepare_embedded(_embedded(config))
            wait_for_all("dataset=embedded")
            config = replace(config, dataset=str(_embedded(config)))
        result = loop.run(config, probe=_probe(config, stack))
    if not is_writer():
        return
    losses = {"loss": result.loss, "validation loss": result.val_loss}
    known = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
    print(f"step {result.step}: {', '.join(known) or 'nothing left to do'}")  # noqa: T201
    print(f"next: crystallm sample --model {shlex.quote(config.out_dir)} --composition Na4Cl4 --out samples")  # noqa: T201


def _probe(config: TrainConfig, stack: contextlib.ExitStack) -> ValidityProbe | None:
    """What samples in the middle of the run, if that is asked for."""
    if config.sample_interval == 0 or not config.dataset:
        return None
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


def _embedded(config: TrainConfig) -> Path:
    return Path(config.out_dir) / "dataset"


def _prepare_embedded(folder: Path) -> None:
    """Prepare the corpus in the package into a folder of the run, unless it is there already."""
    if not (folder / "meta.json").is_file():
        report = prepare([EMBEDDED], folder, selection=Selection(split=Split(*_EMBEDDED_SPLIT)))
        print(f"embedded corpus: {report.n_kept:,} crystals, {report.n_tokens:,} tokens in {folder}")  # noqa: T201
