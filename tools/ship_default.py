"""Put what the run of the model in the package has learned into the package.

    python tools/ship_default.py
    python tools/ship_default.py --decay-iters 500 --dry-run
    python tools/ship_default.py --evaluate-only default

It branches a decay of the learning rate off the newest checkpoint of `runs/default` (which goes on meanwhile), takes
the better of the decay's last weights and their moving average, measures them, writes their card, and puts them in
the place of the model in the package, if they are better than it. Measured are the validation loss of whole files, and
the validity of one sample for each of 200 test compositions of `mp_26k`, at temperature 1.0 and 0.5, unconstrained,
held to symmetry, and to positions. SIGTERM ends it with exit code 75, Ctrl-C with 130; the same command goes on.
"""

import argparse
import logging
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from default_data import CRYSTALS, ROOT, SHARED_DATA, RawData, prepare_where_needed
from train_default import DEDUP, faster_dtype

from crystallm_jax.cli import log_to_stderr, quiet_libtpu
from crystallm_jax.cli import main as crystallm
from crystallm_jax.errors import CrystallmError, ModelError
from crystallm_jax.signals import StoppedError, StopRequest, exit_code, stop_between

# JAX is imported where it is needed: the processes that prepare and judge crystals import this file too.
if TYPE_CHECKING:
    from default_branch import Branch
    from measure_default import Measured

    from crystallm_jax.models.model import Model
    from crystallm_jax.train_run.train_config import TrainConfig

TARGET = ROOT / "crystallm_jax" / "assets" / "default"
MOST_BYTES = 20_000_000
"""What a model in the package may take."""
EXPORT_FOLDER = "export"
# By exit code, the signal that ended a command.
_STOPPED = {exit_code(number): number for number in (signal.SIGTERM, signal.SIGINT)}

logger = logging.getLogger("crystallm_jax.tools.ship_default")


def main(arguments: Sequence[str] | None = None) -> int:
    """Branch, measure and ship; returns the exit code: 0 also where the model is not better and stays out."""
    given = parse(arguments)
    log_to_stderr()
    quiet_libtpu()
    try:
        with stop_between("stopped; the same command goes on") as stop:
            return evaluate(given, stop) if given.evaluate_only else ship(given, stop)
    except (CrystallmError, StoppedError) as error:
        print(f"ship_default: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, text: str, **how: Any) -> None:
        shown = " (default: %(default)s)" if "default" in how else ""
        parser.add_argument(flag, help=text + shown, **how)

    add("--run", "the run to branch off", type=Path, default=Path("runs/default"), metavar="DIR")
    add(
        "--decay-iters",
        "steps of the decay (default: a tenth of the run's, at least 200)",
        type=int,
        metavar="N",
    )
    add(
        "--out-dir",
        "the decay (default: an unfinished one, else decay_STEP beside the run)",
        type=Path,
        metavar="DIR",
    )
    add("--target", "the model to replace", type=Path, default=TARGET, metavar="DIR")
    add("--dataset", "prepared, with validation set", type=Path, default=Path("data/mp_123k"), metavar="DIR")
    add("--data", "raw crystals of it", default=str(SHARED_DATA / "mp_123k"), metavar="DIR")
    add("--test-dataset", "prepared, to sample for", type=Path, default=Path("data/mp_26k"), metavar="DIR")
    add("--test-data", "raw crystals of it", default=str(SHARED_DATA / "mp_26k"), metavar="DIR")
    add("--count", "test compositions to sample for", type=int, default=200, metavar="N")
    add("--seed", "of the samples", type=int, default=0, metavar="S")
    add("--tokens-before", "read before the run began (default: as it says itself)", type=int, metavar="N")
    add("--crystals", "what it learned from, for the card", default=CRYSTALS, metavar="TEXT")
    add("--scratch", "where samples are kept", type=Path, default=Path("runs/measured"), metavar="DIR")
    results = ROOT / "benchmarks" / "results" / "default_model.json"
    add("--results", "figures are added to it", type=Path, default=results, metavar="FILE")
    add("--evaluate-only", "measure this model alone, ship nothing", metavar="MODEL")
    add("--dry-run", "do all but replace the target", action="store_true")
    add("--force", "replace it by a worse one too", action="store_true")
    add("--dtype", "of the decay (default: the faster)", choices=("float32", "bfloat16"))
    return parser.parse_args(arguments)


def evaluate(given: argparse.Namespace, stop: StopRequest) -> int:
    """Measure one model; returns the exit code.

    Raises:
        CrystallmError: a model or data that cannot be used.
        StoppedError: a signal ended it.
    """
    from crystallm_jax.models.locate import bare_name  # noqa: PLC0415

    prepare(given, given.dataset)
    measured = measured_of(given.evaluate_only, bare_name(given.evaluate_only), given, given.dataset, stop)
    report(measured, given)
    return 0


def ship(given: argparse.Namespace, stop: StopRequest) -> int:
    """Branch a decay, measure its end, and put it into the package; returns the exit code.

    Raises:
        CrystallmError: a run, a model or data that cannot be used.
        StoppedError: a signal ended it.
    """
    from default_branch import find_branch, write_branch  # noqa: PLC0415
    from swap_folder import swap_folder  # noqa: PLC0415

    from crystallm_jax.config import load_config  # noqa: PLC0415
    from crystallm_jax.train_run.names import CONFIG_FILE  # noqa: PLC0415
    from crystallm_jax.train_run.train_config import TrainConfig  # noqa: PLC0415

    branch = find_branch(given.run, given.out_dir, given.decay_iters)
    settings = load_config(TrainConfig, branch.run / CONFIG_FILE)
    dataset = Path(settings.dataset)
    prepare(given, dataset)
    write_branch(branch)
    if code := decay(branch, settings, given.dtype):
        return code
    exported = branch.folder / EXPORT_FOLDER
    measured = export(branch, settings, exported, given=given, stop=stop)
    report(measured, given)
    size = sum(path.stat().st_size for path in exported.iterdir())
    if size > MOST_BYTES:
        raise ModelError(
            f"{exported}: {size:,} bytes are more than a model in the package may take, {MOST_BYTES:,}"
        )
    worse = shortcomings(measured, exported, given=given, dataset=dataset, stop=stop)
    if given.dry_run or (worse and not given.force):
        print(f"{exported} is not shipped: {worse or 'a dry run'}{'; --force ships it' if worse else ''}")
    else:
        swap_folder(exported, given.target)
        print(f"{given.target}: replaced by {exported}{f', though {worse}' if worse else ''}")
    if not given.dry_run:
        write_branch(branch, f"not shipped: {worse}" if worse and not given.force else "shipped")
    return 0


def prepare(given: argparse.Namespace, dataset: Path) -> None:
    """Prepare the crystals that are not yet.

    Raises:
        CrystallmError: they cannot be prepared.
    """
    for data in (RawData(given.data, dataset, DEDUP), RawData(given.test_data, given.test_dataset)):
        code = prepare_where_needed(data)
        if (number := _STOPPED.get(code)) is not None:
            raise StoppedError(number, "stopped while crystals were prepared; the same command goes on")
        if code:
            raise ModelError(f"{data.folder}: could not be prepared: see above")


def decay(branch: "Branch", settings: "TrainConfig", dtype: str | None) -> int:
    """Train the decay to its end; returns the exit code of `crystallm train`."""
    from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, CONFIG_FILE  # noqa: PLC0415

    if (branch.folder / CHECKPOINTS_FOLDER / str(branch.last_step)).is_dir():
        return 0
    logger.info(
        "%s: %d steps of decay from step %d of %s", branch.folder, branch.decay_iters, branch.step, branch.run
    )
    return crystallm(
        [
            *("train", "--config", str(branch.run / CONFIG_FILE)),
            f"out_dir={branch.folder}",
            f"init_from={branch.run / CHECKPOINTS_FOLDER / str(branch.step)}",
            "init_state=all",
            "existing_run=resume",
            f"max_iters={branch.last_step}",
            f"decay_iters={branch.decay_iters}",
            "min_lr=0",
            f"dtype={dtype or faster_dtype(settings, Path(settings.dataset))}",
        ]
    )


def export(
    branch: "Branch", settings: "TrainConfig", folder: Path, *, given: argparse.Namespace, stop: StopRequest
) -> "Measured":
    """Write the better weights of a decay's end as a model folder with its card, and measure what was written.

    Raises:
        CrystallmError: the run cannot be read.
        StoppedError: a signal ended it.
    """
    from dataclasses import replace  # noqa: PLC0415

    from default_card import make_card  # noqa: PLC0415
    from default_origin import read_origin  # noqa: PLC0415

    from crystallm_jax.files import new_file  # noqa: PLC0415
    from crystallm_jax.models.card import CARD_FILE  # noqa: PLC0415
    from crystallm_jax.models.model_folder import write_folder  # noqa: PLC0415

    weights, kept = better_weights(branch, Path(settings.dataset), stop)
    # Whatever arithmetic it was trained in, it is read in float32.
    weights = replace(weights, config=replace(weights.config, dtype="float32", dropout=0.0, attention="auto"))
    shutil.rmtree(folder, ignore_errors=True)
    written = write_folder(folder, weights, dtype="float16")
    measured = measured_of(str(folder), branch.folder.name, given, Path(settings.dataset), stop)
    origin = read_origin(branch.run)
    if given.tokens_before is not None:
        origin = replace(origin, tokens=given.tokens_before)
    card = make_card(
        branch, settings, weights.config, measured, origin=origin, crystals=given.crystals, kept=kept
    )
    card = replace(card, parameters=written.parameters, files=written.files)
    with new_file(folder / CARD_FILE, ModelError) as partial:
        partial.write_text(card.to_markdown(), encoding="utf-8")
    return measured


def better_weights(branch: "Branch", dataset: Path, stop: StopRequest) -> "tuple[Model, str]":
    """Of a decay's last weights and their moving average those of the lower validation loss, and words for it.

    Raises:
        CrystallmError: the run cannot be read.
        StoppedError: a signal ended it.
    """
    from measure_default import losses_of  # noqa: PLC0415

    from crystallm_jax.models.model import Model  # noqa: PLC0415
    from crystallm_jax.models.parameters import flattened, params_from_named  # noqa: PLC0415
    from crystallm_jax.models.runs import run_model_config  # noqa: PLC0415
    from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER  # noqa: PLC0415
    from crystallm_jax.training.checkpoint import Checkpoints  # noqa: PLC0415

    found: dict[str, Model] = {}
    with Checkpoints(branch.folder / CHECKPOINTS_FOLDER) as checkpoints:
        saved = checkpoints.read(lambda names: names[0] in ("params", "ema"), branch.last_step)
        config = run_model_config(branch.folder, saved.description)
        for name, root in (("the last weights", "params"), ("their moving average", "ema")):
            if saved.arrays.get(root):
                place = f"{checkpoints.folder / str(saved.step)}: {root}"
                params = params_from_named(flattened(saved.arrays[root]), config, place=place)
                found[name] = Model(config, params)
    losses = {name: losses_of(each, [dataset], stop=stop)[dataset.name].loss for name, each in found.items()}
    best = min(losses, key=lambda name: losses[name])
    told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    logger.info("validation loss of %s: %s taken", told, best)
    return found[best], f"{best} (validation losses in float32: {told})"


def measured_of(
    model: str, name: str, given: argparse.Namespace, dataset: Path, stop: StopRequest
) -> "Measured":
    """Measure a model as the command line says."""
    from measure_default import measure  # noqa: PLC0415

    return measure(
        model,
        name=name,
        datasets=list(dict.fromkeys((dataset, given.test_dataset))),
        prompts=given.test_dataset,
        count=given.count,
        seed=given.seed,
        scratch=given.scratch,
        stop=stop,
    )


def report(measured: "Measured", given: argparse.Namespace) -> None:
    """Print what was measured and add it to the results."""
    from measure_default import table, write_results  # noqa: PLC0415

    print(table(measured))
    write_results(given.results, measured)


def shortcomings(
    measured: "Measured", exported: Path, *, given: argparse.Namespace, dataset: Path, stop: StopRequest
) -> str:
    """On which validation sets a model is no better than the one that it would replace; empty where on none.

    Where their contexts differ, both read with the shorter one, so that the same tokens count.

    Raises:
        CrystallmError: the data cannot be read.
        StoppedError: a signal ended it.
    """
    from measure_default import losses_of  # noqa: PLC0415
    from swap_folder import put_right  # noqa: PLC0415

    from crystallm_jax.models.kinds import read_model  # noqa: PLC0415

    put_right(given.target)
    if not given.target.exists():
        return ""
    shipped = read_model(given.target)
    datasets = list(dict.fromkeys((dataset, given.test_dataset)))
    shortest = min(shipped.config.block_size, measured.block_size)
    theirs = losses_of(shipped, datasets, stop=stop, block_size=shortest)
    ours = measured.losses
    if shortest < measured.block_size:
        ours = losses_of(read_model(exported), datasets, stop=stop, block_size=shortest)
    for name, found in ours.items():
        logger.info(
            "%s, context %d: validation loss %.4f, shipped %.4f",
            name,
            shortest,
            found.loss,
            theirs[name].loss,
        )
    return ", ".join(
        f"its validation loss on {name} is {found.loss:.4f}, that of the shipped one {theirs[name].loss:.4f}"
        for name, found in ours.items()
        if not found.loss < theirs[name].loss
    )


if __name__ == "__main__":
    sys.exit(main())
