"""One run of `recipe.py` in this package; started by it, a process a run.

    python benchmarks/recipe_jax.py '{"settings": {...}, "dataset": DIR, "val_dataset": DIR, "out_dir": DIR}'
    python benchmarks/recipe_jax.py '{"settings": {...}, "dataset": DIR, "speed": {"rounds": 3, "steps": 8}}'

The first trains with the training loop itself and prints the validation loss of the last weights and, where the run
keeps one, of their moving average; the second times steps. Each prints one line of JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from crystallm_jax.data.feed import open_feed
from crystallm_jax.data.store import TokenStore
from crystallm_jax.model import count_params
from crystallm_jax.models.model import Model
from crystallm_jax.models.parameters import flattened, params_from_named
from crystallm_jax.models.runs import run_model_config
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER
from crystallm_jax.train_run.status import read_lines
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.evaluate import loss_of_files
from crystallm_jax.training.loop import run
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps, initial_state

# Of the validation set, that are evaluated on.
FILES = 300


def train_config(settings: dict[str, Any], **rest: Any) -> TrainConfig:
    """The run of a case: float32, evaluated and saved at its end alone."""
    steps = int(settings["max_iters"])
    return TrainConfig(
        dtype="float32",
        gradient_accumulation_steps=1,
        eval_interval=steps,
        checkpoint_interval=steps,
        eval_iters_val=0,
        existing_run="resume",
        **{**settings, **rest},
    )


def trained(job: dict[str, Any]) -> dict[str, Any]:
    """Train a case and tell its losses, nats a token over files of the validation set."""
    out_dir = Path(job["out_dir"])
    config = train_config(job["settings"], dataset=job["dataset"], out_dir=str(out_dir))
    run(config)
    val_store = TokenStore.open(job["val_dataset"], "val")
    with Checkpoints(out_dir / CHECKPOINTS_FOLDER) as checkpoints:
        saved = checkpoints.read(lambda names: names[0] in ("params", "ema"))
        model_config = run_model_config(out_dir, saved.description)

    def loss(tree: str) -> float:
        params = params_from_named(flattened(saved.arrays[tree]), model_config, place=tree)
        return loss_of_files(Model(model_config, params), val_store, first=FILES).loss

    lines = read_lines(out_dir)
    return {
        "val_loss": loss("params"),
        "average_val_loss": loss("ema") if config.ema_decay > 0 else None,
        "steps": config.max_iters,
        "tokens": config.max_iters * config.tokens_per_step,
        "train_losses": [[line["step"], line["loss"]] for line in lines],
    }


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds that a step takes, one number a round, and the parameters."""
    config = train_config(job["settings"], dataset=job["dataset"])
    store = TokenStore.open(config.dataset)
    model_config = config.model_config(store.header.vocab_size)
    steps = compile_steps(config, model_config, make_mesh(1, 1, jax.devices()[:1]))
    state = initial_state(config, model_config, steps)
    feed = open_feed(
        store,
        block_size=config.block_size,
        windows=config.windows,
        batch_size=config.batch_size,
        micro_batches=1,
        seed=config.seed,
    )
    found = []
    for number in range(job["speed"]["rounds"] + 1):
        begun = time.perf_counter()
        for _ in range(job["speed"]["steps"]):
            state, metrics = steps.train(state, jax.device_put(next(feed), steps.micro_batches))
        jax.block_until_ready(metrics)
        if number:  # the first compiles
            found.append((time.perf_counter() - begun) / job["speed"]["steps"])
    feed.close()
    return {
        "step_s": found,
        "tokens_per_step": config.tokens_per_step,
        "parameters": count_params(steps.abstract.params),
    }


def main() -> int:
    """Do the job of the one argument and print the result."""
    job = json.loads(sys.argv[1])
    if job.get("core") is not None:
        os.sched_setaffinity(
            0, {job["core"]}
        )  # before the first array: the pool of threads is as large as this
    print(json.dumps(speed(job) if "speed" in job else trained(job)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
