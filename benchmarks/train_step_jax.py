"""One case of `train_step.py` in this package; started by it, a process a case, so that memory is free again.

    python benchmarks/train_step_jax.py '{"case": {...}, "micro_batches": 4, "seconds": 3, "runs": 3}'
    python benchmarks/train_step_jax.py '{"probe": ["small", "large"]}'

Prints one line of JSON. It imports of the package what needs jax, flax and optax alone.
"""

import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from train_step_cases import MODELS, VOCAB_SIZE, Case

from crystallm_jax.data.packing import Batch
from crystallm_jax.model import count_params, flops_per_token, init_params
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.chips import device_peak_flops
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps, initial_state

RECORDS_IN_A_PACKED_ROW = 3
HOST_BATCHES = 4
PROFILED_STEPS = 3


def train_config(case: Case, micro_batches: int) -> TrainConfig:
    """The run that a case is a step of: the published optimiser."""
    return TrainConfig(
        **MODELS[case.model],
        gradient_accumulation_steps=micro_batches,
        batch_size=case.batch_size,
        remat=case.remat,  # type: ignore[arg-type]
        attention=case.attention,  # type: ignore[arg-type]
        dtype=case.dtype,  # type: ignore[arg-type]
        layers=case.layers,  # type: ignore[arg-type]
        windows=case.windows,  # type: ignore[arg-type]
        dropout=case.dropout,
        attention_dropout=case.attention_dropout,
        learning_rate=1e-3,
        min_lr=1e-4,
        beta2=0.99,
        warmup_iters=100,
    )


def random_batch(config: TrainConfig, seed: int) -> Batch:
    """Random tokens [A, B, T + 1], in three segments a row where rows are packed."""
    rows = (config.gradient_accumulation_steps, config.batch_size)
    T = config.block_size
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (*rows, T + 1), dtype=np.uint16)
    if config.windows != "packed":
        return Batch(tokens)
    segments = (np.arange(T + 1) * RECORDS_IN_A_PACKED_ROW // (T + 1) + 1).astype(np.uint16)
    first = np.searchsorted(segments, segments)
    whole = [
        np.broadcast_to(leaf, (*rows, T)).copy()
        for leaf in (
            segments[:-1],
            (np.arange(T) - first[:-1]).astype(np.uint16),
            segments[:-1] == segments[1:],
        )
    ]
    return Batch(tokens, *whole)


def measure(
    case: Case, *, micro_batches: int, seconds: float, runs: int, profile: str | None
) -> dict[str, Any]:
    """Rates of the runs, compile time, memory; `profile` is a folder for a trace of three steps instead of runs."""
    config = train_config(case, micro_batches)
    model_config = config.model_config(VOCAB_SIZE)
    device = jax.devices()[0]
    steps = compile_steps(config, model_config, make_mesh(1, 1, [device]))
    state = initial_state(config, model_config, steps)
    host = [random_batch(config, seed) for seed in range(HOST_BATCHES)]

    def placed(number: int) -> Batch:
        return jax.device_put(host[number % HOST_BATCHES], steps.micro_batches)

    begun = time.perf_counter()
    train = steps.train.lower(state, placed(0)).compile()  # type: ignore[attr-defined]
    compile_s = time.perf_counter() - begun

    def run(least_s: float, least_steps: int) -> float:
        """Tokens a second, as the loop steps: the next batch is placed and metrics are fetched behind a step's back."""
        nonlocal state
        batch, pending, count = placed(0), None, 0
        begun = time.perf_counter()
        while count < least_steps or time.perf_counter() - begun < least_s:
            state, metrics = train(state, batch)
            count += 1
            batch = placed(count)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
        if not np.isfinite(jax.device_get(pending).loss):
            raise FloatingPointError("the loss is not finite")
        return count * config.tokens_per_step / (time.perf_counter() - begun)

    run(0.0, 2)
    if profile is not None:
        with jax.profiler.trace(profile):
            run(0.0, PROFILED_STEPS)
        runs = 0
    rates = [run(seconds, 3) for _ in range(runs)]
    stats = device.memory_stats() or {}
    analysis = train.memory_analysis()
    planned = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": rates,
        "compile_s": compile_s,
        # What the device's allocator saw; on a CPU, which has none, the whole process.
        "peak_memory_bytes": stats.get("peak_bytes_in_use", process),
        "planned_memory_bytes": planned,
        "process_memory_bytes": process,
    }


def probe(models: list[str]) -> dict[str, Any]:
    """The machine, and what a token of each model costs."""
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "peak_flops": {dtype: device_peak_flops(dtype) for dtype in ("bfloat16", "float32")},
        "models": {},
    }
    for name in models:
        config = train_config(Case(model=name), 1).model_config(VOCAB_SIZE)
        params = count_params(
            jax.eval_shape(lambda key, config=config: init_params(config, key), jax.random.key(0))
        )
        found["models"][name] = {
            **MODELS[name],
            "parameters": params,
            "flops_per_token": flops_per_token(config, params),
        }
    return found


def main() -> int:
    """Do what the one argument asks and print the result."""
    job = json.loads(sys.argv[1])
    if "probe" in job:
        print(json.dumps(probe(job["probe"])))
        return 0
    result = measure(
        Case(**job["case"]),
        micro_batches=job["micro_batches"],
        seconds=job["seconds"],
        runs=job["runs"],
        profile=job.get("profile"),
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
