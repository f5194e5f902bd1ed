"""Kills a training run at random moments, gives the same command again, and looks whether anything is lost.

    python benchmarks/faults.py [--kills 50] [--steps 1000] [--interval 10] [--seed 0] [--out FILE]

A tiny model (dropout, moving average, several micro-batches a step) trains on the CPU, once undisturbed and once under
SIGKILL: a fifth of the kills fall while the program starts, half behind a random number of steps, up to five intervals
of checkpoints, the others while a checkpoint is being written. Each is followed by the same command with
existing_run=resume, until the run is done. At the end both runs must have the same losses and norms at every step and
the same final state, bit for bit. Exit code 1 says that something was lost, or that the run was done before all kills
fell (give more --steps).
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.preparing.writer import StoreWriter

ROOT = Path(__file__).parents[1]
MOMENTS = {"starting": 0.2, "training": 0.5, "saving": 0.3}
# The kill falls at a random moment within these seconds from there on, and behind so many intervals at most.
WITHIN = {"starting": 8.0, "training": 0.2, "saving": 0.05}
INTERVALS = {"starting": 0, "training": 5, "saving": 3}
# What must be equal at every step; the rest of a line are times and places.
COMPARED = ("loss", "lr", "grad_norm", "param_norm", "update_norm", "skipped", "tokens")
# Seconds after which a process that does not come to where it is to be killed counts as hanging.
PATIENCE = 300.0
SETTINGS = (
    *("n_layer=1", "n_head=2", "n_embd=16", "block_size=32", "batch_size=2", "gradient_accumulation_steps=3"),
    *("dropout=0.1", "ema_decay=0.9", "learning_rate=1e-3", "min_lr=1e-4", "warmup_iters=5", "dtype=float32"),
    *("validate=true", "eval_iters_val=1", "keep_checkpoints=2", "existing_run=resume"),
)


@dataclass(frozen=True)
class Life:
    """One process of the run.

    Attributes:
        moment: at which it was to be killed: `starting`, `training` or `saving`; `to the end` where it was not.
        killed: whether it was, before it ended by itself.
        began_at: the step that it went on from; None where it did not come so far.
        last_step: the newest step in `metrics.jsonl` when it was gone.
        seconds: that it lived.
    """

    moment: str
    killed: bool
    began_at: int | None
    last_step: int
    seconds: float


def write_dataset(folder: Path) -> None:
    """Prepare the first crystals of the embedded corpus."""
    tokenizer = CIFTokenizer()
    with StoreWriter(folder) as out:
        for i, record in enumerate(itertools.islice(read_corpus(), 40)):
            tokens = tokenizer.encode_cif(stream_text(preprocess_cif(record.text)))
            out.add(record.id, tokens, split="val" if i % 10 == 9 else "train", underrepresented=False)
        out.commit(sources=(), options={}, counts={}, versions={})


def command(dataset: Path, out_dir: Path, *, steps: int, interval: int) -> list[str]:
    """What starts the run, and starts it again."""
    places = [f"dataset={dataset}", f"out_dir={out_dir}", f"compilation_cache={dataset.parent / 'compiled'}"]
    lengths = [f"max_iters={steps}", f"lr_decay_iters={steps}", f"checkpoint_interval={interval}"]
    return [sys.executable, "train.py", *SETTINGS, *places, *lengths, f"eval_interval={interval * 10}"]


def metrics(out_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are whole."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (out_dir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def last_step(out_dir: Path) -> int:
    """The newest step that is logged."""
    lines = metrics(out_dir)
    return lines[-1]["step"] if lines else 0


def live(
    words: list[str], out_dir: Path, *, moment: str = "to the end", interval: int = 1, rng: random.Random
) -> Life:
    """Start the run, and kill it at a moment of the kind, or let it run to its end."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    log = out_dir.parent / "stderr.txt"
    since = time.perf_counter()
    with log.open("w") as stderr:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            if moment == "to the end":
                process.wait()
            else:
                behind = rng.randint(0, INTERVALS[moment] * interval)
                for _ in _until(lambda: _reached(moment, out_dir, log, behind), process):
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, WITHIN[moment]))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    killed = process.returncode == -signal.SIGKILL
    if not killed and process.returncode != 0:
        raise SystemExit(
            f"benchmarks/faults.py: a run ended with {process.returncode}: {log.read_text()[-2000:]}"
        )
    begun = re.search(r"from step (\d+) of", log.read_text())
    seconds = round(time.perf_counter() - since, 2)
    return Life(moment, killed, int(begun[1]) if begun else None, last_step(out_dir), seconds)


def _until(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> Iterator[None]:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"benchmarks/faults.py: no progress within {PATIENCE:.0f} s")
        yield


def _reached(moment: str, out_dir: Path, log: Path, behind: int) -> bool:
    """Whether a process is where the time to its kill begins to run: at its start, or so many steps behind it."""
    if moment == "starting":
        return True
    begun, path = re.search(r"from step (\d+) of", log.read_text()), out_dir / "metrics.jsonl"
    # The lines of steps that are redone are cut off after this is said, before the first new one.
    if begun is None or not path.exists() or path.stat().st_mtime <= log.stat().st_mtime:
        return False
    if last_step(out_dir) < int(begun[1]) + max(1, behind):
        return False
    return moment == "training" or any((out_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def compare(undisturbed: Path, killed: Path, *, steps: int) -> dict[str, Any]:
    """Whether two runs came to the same, and what is left of the kills."""
    lines = [metrics(undisturbed), metrics(killed)]
    numbers = [[line["step"] for line in of_run] for of_run in lines]
    values = [[[line[name] for name in COMPARED] for line in of_run] for of_run in lines]
    val_losses = [{line["step"]: line["val_loss"] for line in run if "val_loss" in line} for run in lines]
    left = sorted(path.name for path in killed.rglob("*") if "tmp" in path.name or "partial" in path.name)
    return {
        "every_step_once": numbers[1] == list(range(1, steps + 1)) == numbers[0],
        "losses_identical": values[0] == values[1] and val_losses[0] == val_losses[1],
        "states_identical": _same_states(undisturbed, killed),
        "left_over": left,
    }


def _same_states(*folders: Path) -> bool:
    """Whether the final checkpoints hold the same arrays: parameters, their average, and the optimiser's moments."""
    import jax  # noqa: PLC0415 - the campaign itself needs none

    from crystallm_jax.config import load_config  # noqa: PLC0415
    from crystallm_jax.train_run.train_config import TrainConfig  # noqa: PLC0415
    from crystallm_jax.training.checkpoint import Checkpoints  # noqa: PLC0415
    from crystallm_jax.training.sharding import make_mesh  # noqa: PLC0415
    from crystallm_jax.training.step import compile_steps  # noqa: PLC0415

    states = []
    for folder in folders:
        config = load_config(TrainConfig, folder / "config.yaml")
        with Checkpoints(folder / "checkpoints") as checkpoints:
            model_config = config.model_config(int(checkpoints.describe()["vocab_size"]))
            steps = compile_steps(config, model_config, make_mesh(1, 1, jax.local_devices()[:1]))
            states.append(jax.device_get(checkpoints.restore(steps.abstract).state))
    return all(map(np.array_equal, *(jax.tree.leaves(state) for state in states)))


def campaign(folder: Path, *, kills: int, steps: int, interval: int, seed: int) -> dict[str, Any]:
    """Run both, and say what came of it."""
    rng = random.Random(seed)
    dataset, straight, broken = (folder / name for name in ("dataset", "undisturbed", "killed"))
    write_dataset(dataset)
    undisturbed = live(command(dataset, straight, steps=steps, interval=interval), straight, rng=rng)
    words = command(dataset, broken, steps=steps, interval=interval)
    lives: list[Life] = []
    redone: list[int] = []
    while not lives or lives[-1].killed:
        done = len([life for life in lives if life.killed])
        moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0] if done < kills else "to the end"
        newest = last_step(broken)
        lives.append(live(words, broken, moment=moment, interval=interval, rng=rng))
        life = lives[-1]
        if life.began_at is not None:
            redone.append(newest - life.began_at)
        print(
            f"{done + life.killed:4} {life.moment:10} from step {life.began_at} to {life.last_step}, "
            f"{redone[-1] if life.began_at is not None else '-'} steps redone, {life.seconds:.1f} s",
            flush=True,
        )
    struck = Counter(life.moment for life in lives if life.killed)
    return {
        "kills": sum(struck.values()),
        "moments": dict(struck),
        "redone_most": max(redone),
        "redone_mean": round(sum(redone) / len(redone), 2),
        "seconds_undisturbed": undisturbed.seconds,
        "seconds_of_all_lives": round(sum(life.seconds for life in lives), 1),
        **compare(straight, broken, steps=steps),
        "lives": [asdict(life) for life in lives],
    }


def main() -> int:
    """Run the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of the run (%(default)s)")
    parser.add_argument("--interval", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/faults.json"), help="JSON (%(default)s)")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = campaign(
            Path(folder),
            kills=settings.kills,
            steps=settings.steps,
            interval=settings.interval,
            seed=settings.seed,
        )
    for name, value in results.items():
        if name != "lives":
            print(f"{name:22} {value}")
    report = {
        "settings": {name: value for name, value in vars(settings).items() if name != "out"},
        "run": SETTINGS,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "grain", "numpy")},
        "results": results,
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report, indent=1) + "\n")
    kept = all(results[name] for name in ("every_step_once", "losses_identical", "states_identical"))
    return 0 if kept and not results["left_over"] and results["kills"] >= settings.kills else 1


if __name__ == "__main__":
    sys.exit(main())
