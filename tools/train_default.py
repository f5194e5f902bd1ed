"""Train the model in the package on whatever the machine leaves unused.

    python tools/train_default.py
    python tools/train_default.py --data CRYSTALS --init-from MODEL learning_rate=1e-3

It prepares the crystals where they are not yet, and goes on with the run in `runs/default` from its newest checkpoint,
else begins it (`configs/default.yaml`), at the lowest priority, in the faster of float32 and bfloat16. There is one
process, and the first line names it:

    kill -STOP PID    holds it, while something is timed for instance
    kill -CONT PID    lets it go on
    kill PID          saves and ends it, with exit code 75; the same command goes on

In the background start it in a session of its own, so that it stands back behind other sessions too (Linux shares the
processor among sessions first):

    mkdir -p runs; setsid nohup python tools/train_default.py > runs/default.log 2>&1 &

`crystallm info runs/default` tells where it stands, `tools/ship_default.py` makes a model of it.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from default_data import ROOT, SHARED_DATA, RawData, prepare_where_needed

from crystallm_jax.cli import log_to_stderr, quiet_libtpu
from crystallm_jax.cli import main as crystallm
from crystallm_jax.data.corpus import EMBEDDED
from crystallm_jax.errors import ConfigError, CrystallmError, ModelError
from crystallm_jax.signals import StoppedError, stop_at_once
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, is_checkpoint

# JAX is imported where it is needed: the processes that prepare crystals import this file too.
if TYPE_CHECKING:
    from crystallm_jax.model import ModelConfig
    from crystallm_jax.train_run.train_config import TrainConfig

CONFIG = ROOT / "configs" / "default.yaml"
LOWEST_PRIORITY = 19
DEDUP = ("--dedup",)
_SHAPE = ("n_layer", "n_head", "n_embd", "bias", "block_size")

# A child of the package's, so that its messages are shown as those of the package are.
logger = logging.getLogger("crystallm_jax.tools.train_default")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train until a signal ends it; returns the exit code: 75 after SIGTERM, 1 or 2 where something cannot be used."""
    given = parse(arguments)
    log_to_stderr()
    stand_back(given.nice)
    quiet_libtpu()
    try:
        with stop_at_once("stopped between steps, nothing is lost; the same command goes on"):
            return train(given)
    except (CrystallmError, StoppedError) as error:
        print(f"train_default: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_code


def stand_back(nice: int) -> None:
    """Let other processes go first.

    Where Linux groups processes by session (autogroups), a nice value counts within a session alone, and each session
    gets the same share. So a session that this process leads (`setsid python tools/train_default.py`) stands back as a
    whole; in another one there are processes that are not ours to slow down.
    """
    os.nice(nice)
    group = Path("/proc/self/autogroup")
    if os.getsid(0) == os.getpid() and group.is_file():
        try:
            group.write_text(str(nice))
        except OSError as error:  # a kernel without groups, or a container that may not
            logger.warning(
                "other sessions may get no more of the processor than this run: %s", error.strerror
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        default=str(SHARED_DATA / "mp_123k"),
        metavar="DIR",
        help="raw crystals: a folder with train.csv, val.csv and test.csv, compressed or not (default: %(default)s)",
    )
    add(
        "--dataset",
        default="data/mp_123k",
        metavar="DIR",
        help=f"the prepared folder, or `{EMBEDDED}` for the corpus in the package (default: %(default)s)",
    )
    add("--out-dir", default="runs/default", metavar="DIR", help="the run (default: %(default)s)")
    add(
        "--init-from",
        metavar="MODEL",
        help="whose weights a new run begins from, or `scratch` (default: the model in the package where it has this"
        " shape, else scratch)",
    )
    add(
        "--nice",
        type=int,
        default=LOWEST_PRIORITY,
        metavar="N",
        help="how far behind other processes it stands (default: %(default)s, the last: it takes what they leave)",
    )
    add(
        "settings",
        nargs="*",
        metavar="key=value",
        help=f"over those of {CONFIG.name}, as `crystallm train` has them",
    )
    return parser.parse_intermixed_args(arguments)


def train(given: argparse.Namespace) -> int:
    """Prepare, choose and train; returns the exit code.

    Raises:
        CrystallmError: anything that cannot be used.
    """
    from crystallm_jax.config import load_config  # noqa: PLC0415
    from crystallm_jax.train_run.train_config import TrainConfig  # noqa: PLC0415

    for text in given.settings:
        if text.startswith("init_from="):
            raise ConfigError(f"{text}: say --init-from, for a run that is there is gone on with")
    settings = [f"dataset={given.dataset}", f"out_dir={given.out_dir}", *given.settings]
    config = load_config(TrainConfig, CONFIG, settings)
    out_dir = Path(config.out_dir)
    logger.info(
        "process %d: kill -STOP holds it, kill -CONT lets it go on, kill saves and ends it", os.getpid()
    )
    data = RawData(given.data, Path(config.dataset), DEDUP)
    if config.dataset == EMBEDDED:
        data = RawData(EMBEDDED, out_dir / "dataset")
    if code := prepare_where_needed(data):
        return code
    settings += [f"dataset={data.folder}", f"init_from={begin(config, data.folder, given.init_from)}"]
    if not any(text.startswith("dtype=") for text in given.settings):
        settings.append(f"dtype={faster_dtype(config, data.folder)}")
    return crystallm(["train", "--config", str(CONFIG), *settings, "existing_run=resume"])


def begin(config: "TrainConfig", dataset: Path, init_from: str | None) -> str:
    """What the run is to begin from: `resume` where there is one; what a new one began from is kept in its folder.

    Raises:
        CrystallmError: the run that is there has another shape, or there is no such model.
    """
    from default_origin import origin_of, write_origin  # noqa: PLC0415

    from crystallm_jax.data.store import TokenStore  # noqa: PLC0415
    from crystallm_jax.models.kinds import read_model  # noqa: PLC0415
    from crystallm_jax.models.runs import run_model_config  # noqa: PLC0415
    from crystallm_jax.training.checkpoint import Checkpoints  # noqa: PLC0415

    out_dir = Path(config.out_dir)
    wanted = config.model_config(TokenStore.open(dataset).header.vocab_size)
    checkpoints = out_dir / CHECKPOINTS_FOLDER
    if checkpoints.is_dir() and any(is_checkpoint(path) for path in checkpoints.iterdir()):
        with Checkpoints(checkpoints) as saved:
            found = run_model_config(out_dir, saved.describe())
        if misfits := differing(found, wanted):
            raise ModelError(
                f"{out_dir}: its model has {misfits}: give another --out-dir, or the settings that it was begun with"
            )
        return "resume"
    if init_from is None:
        # A longer context is cropped to this one.
        shipped = read_model("default").config
        misfits = differing(shipped, wanted)
        fits = not misfits or (misfits.startswith("block_size=") and shipped.block_size > wanted.block_size)
        init_from = "default" if fits else "scratch"
        logger.info("begun from %s%s", init_from, "" if fits else f": the model in the package has {misfits}")
    write_origin(out_dir, origin_of(init_from))
    return init_from


def differing(found: "ModelConfig", wanted: "ModelConfig") -> str:
    """What differs between two shapes, as `NAME=ITS, not OURS`; empty where nothing does."""
    return ", ".join(
        f"{name}={getattr(found, name)}, not {getattr(wanted, name)}"
        for name in _SHAPE
        if getattr(found, name) != getattr(wanted, name)
    )


def faster_dtype(config: "TrainConfig", dataset: Path) -> str:
    """The arithmetic in which this machine trains faster, timed and told.

    Raises:
        StoppedError: a signal came meanwhile.
    """
    from default_dtype import faster, time_steps  # noqa: PLC0415  JAX

    from crystallm_jax.data.store import TokenStore  # noqa: PLC0415

    rates = time_steps(config, TokenStore.open(dataset))
    dtype = faster(rates)
    told = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items())
    logger.info("%s: %s is taken", told, dtype)
    return dtype


if __name__ == "__main__":
    sys.exit(main())
