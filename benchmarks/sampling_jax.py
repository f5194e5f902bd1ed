"""One case of `sampling.py` in this package; started by it, a process a case, so that memory is free again.

    python benchmarks/sampling_jax.py '{"case": {...}, "waves": 4, "seconds": 30, "runs": 3}'
    python benchmarks/sampling_jax.py '{"probe": ["small", "large"]}'

Prints one line of JSON. It imports of the package what needs jax and flax alone.
"""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampling_cases import MODELS, VOCAB_SIZE, Case, prompts_of

from crystallm_jax.model import ModelConfig, count_params, init_params
from crystallm_jax.sampling.devices import use_all_cores
from crystallm_jax.sampling.generate import generate
from crystallm_jax.sampling.requests import Completion, GenerationRequest, Wanted

# Floats of the array that is copied: a gibibyte, beyond the caches there are.
COPIED = 1 << 28
COPIES = 9


class OwnLimits:
    """One sample of each prompt, each with its own limit.

    Args:
        limits: new tokens of each.
    """

    def __init__(self, limits: Sequence[int]) -> None:
        self._rest = (Wanted(row, 0, limit) for row, limit in enumerate(limits))

    def take(self, most: int) -> Sequence[Wanted]:
        """The next samples, at most so many."""
        return list(islice(self._rest, most))

    def wait(self) -> bool:
        """Nothing comes later: False."""
        return False


class CompileClock:
    """Seconds that JAX spent on tracing and compiling, and how many compilations there were."""

    def __init__(self) -> None:
        self.seconds, self.compilations = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
            self.compilations += event.endswith("backend_compile_duration")


def copy_bandwidth(floats: int) -> float:
    """Bytes a second, read and written, of adding one to an array in place; median of nine.

    In place, because a CPU would otherwise spend the time on pages of memory that are new to the process.
    """
    add_one = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = add_one(jnp.zeros(floats, jnp.float32)).block_until_ready()
    seconds = []
    for _ in range(COPIES):
        begun = time.perf_counter()
        array = add_one(array).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * array.nbytes / statistics.median(seconds)


def completions(
    config: ModelConfig,
    params: dict,
    prompts: list[np.ndarray],
    limits: Sequence[int],
    request: GenerationRequest,
) -> Iterator[list[Completion]]:
    """Complete each prompt by exactly so many tokens: none ends a text, for no token has the newline's id."""
    never = config.vocab_size
    if len(set(limits)) == 1:
        return generate(config, params, prompts, newline_id=never, request=request)
    return generate(
        config,
        params,
        prompts,
        newline_id=never,
        request=request,
        orders=OwnLimits(limits),
    )


def measure(case: Case, *, waves: int, seconds: float, runs: int, copied: int = COPIED) -> dict[str, Any]:
    """Rates of the runs, compile time, memory, and the bandwidth of this moment."""
    clock = CompileClock()
    config = ModelConfig(**MODELS[case.model], vocab_size=VOCAB_SIZE, dtype=case.dtype)  # type: ignore[arg-type]
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    limits = case.limits(waves)
    prompts = [np.array(prompt, np.uint16) for prompt in prompts_of(len(limits))]

    def run(seed: int) -> float:
        """Seconds of one run over all rows."""
        request = GenerationRequest(
            max_new_tokens=max(limits),
            seed=seed,
            batch_size=case.batch_size,
            cache_dtype=None if case.cache_dtype == "model" else case.cache_dtype,  # type: ignore[arg-type]
        )
        begun = time.perf_counter()
        done = [row for batch in completions(config, params, prompts, limits, request) for row in batch]
        spent = time.perf_counter() - begun
        written = sorted((row.prompt_index, len(row.token_ids) - len(prompts[0])) for row in done)
        if written != list(enumerate(limits)):
            raise AssertionError("rows did not get the tokens that were asked of them")
        return spent

    run(0)
    compiled, at_first = clock.seconds, clock.compilations
    spent: list[float] = []
    while len(spent) < runs and sum(spent) < seconds:
        spent.append(run(len(spent)))
    compiled_later = clock.compilations - at_first
    stats = jax.devices()[0].memory_stats() or {}
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": [sum(limits) / one for one in spent],
        "rows": len(limits),
        "compile_s": compiled,
        # Of the measured runs: 0 if the warm-up met every shape.
        "compilations_in_runs": compiled_later,
        "peak_memory_bytes": stats.get("peak_bytes_in_use", process),
        "bandwidth": copy_bandwidth(copied),
    }


def probe(models: list[str]) -> dict[str, Any]:
    """The machine, and the size of each model."""
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "models": {},
    }
    for name in models:
        config = ModelConfig(**MODELS[name], vocab_size=VOCAB_SIZE)
        shapes = jax.eval_shape(lambda key, config=config: init_params(config, key), jax.random.key(0))
        found["models"][name] = {**MODELS[name], "parameters": count_params(shapes)}
    return found


def main() -> int:
    """Do what the one argument asks and print the result."""
    job = json.loads(sys.argv[1])
    if "probe" in job:
        print(json.dumps(probe(job["probe"])))
        return 0
    case = Case(**job["case"])
    use_all_cores(case.batch_size)
    result = measure(case, waves=job["waves"], seconds=job["seconds"], runs=job["runs"])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
