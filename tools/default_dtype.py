"""Which arithmetic trains faster on this machine: steps of a run in float32 and in bfloat16, timed side by side.

Parameters and the optimiser's state are float32 either way, so a run may change its arithmetic whenever it goes on.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import jax
import numpy as np

from crystallm_jax.data.feed import open_feed
from crystallm_jax.data.packing import Batch
from crystallm_jax.data.store import TokenStore
from crystallm_jax.model.config import DType
from crystallm_jax.signals import stop_between
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps, initial_state

# Steps of each, in turns: of what shares the machine, both get the same.
ROUNDS = 4


def faster(rates: Mapping[DType, float]) -> DType:
    """The arithmetic of more tokens a second; float32 where both are alike."""
    return "bfloat16" if rates["bfloat16"] > rates["float32"] else "float32"


def time_steps(config: TrainConfig, store: TokenStore) -> dict[DType, float]:
    """Tokens a second of a run's step in each arithmetic, the best of a few, compilation left out.

    Args:
        config: the run.
        store: its training set, of which one batch is read.

    Raises:
        CrystallmError: a configuration that does not fit the data or the devices.
        StoppedError: SIGTERM or Ctrl-C came, and the step on its way is done.
    """
    batch = _first_batch(config, store)
    steps: dict[DType, Callable[[], None]] = {}
    with stop_between("stopped; the same command goes on") as stop:
        for dtype in get_args(DType):
            steps[dtype] = _stepper(replace(config, dtype=dtype), store.header.vocab_size, batch)
            stop.check()
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(ROUNDS):
            for dtype, step in steps.items():
                begun = time.perf_counter()
                step()
                best[dtype] = min(best[dtype], time.perf_counter() - begun)
                stop.check()
    return {dtype: config.tokens_per_step / seconds for dtype, seconds in best.items()}


def _first_batch(config: TrainConfig, store: TokenStore) -> Batch:
    feed = open_feed(
        store,
        block_size=config.block_size,
        windows=config.windows,
        batch_size=config.batch_size,
        micro_batches=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    with contextlib.closing(feed):
        return next(feed)


def _stepper(config: TrainConfig, vocab_size: int, batch: Batch) -> Callable[[], None]:
    """A function that takes one step and waits for it; it has been compiled."""
    model_config = config.model_config(vocab_size)
    steps = compile_steps(
        config, model_config, make_mesh(config.data_parallel, config.fsdp, tensor=config.tensor)
    )
    state = initial_state(config, model_config, steps)
    placed = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), steps.micro_batches), batch)

    def step() -> None:
        nonlocal state
        state, metrics = steps.train(state, placed)
        jax.block_until_ready(metrics)

    step()
    return step
