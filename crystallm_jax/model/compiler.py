"""What the compiler is told: options worth having, and where compiled steps are kept."""

import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from crystallm_jax.artifacts.cache import cache_folder
from crystallm_jax.errors import ConfigError

AUTO = "auto"

# For several GPUs: collectives are started early and awaited late, those of scanned layers one layer ahead. On TPU the
# compiler does so by itself; on one device there are none. Not measured by us yet.
SEVERAL_GPUS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}

# Of what sampling keeps compiled: a hundred models and batches.
_KEPT_BYTES = 2**30

logger = logging.getLogger(__name__)


def step_options(mesh: Mesh) -> dict[str, bool | str]:
    """Compiler options of a step on a mesh; those that the installed compiler does not know are left out, and said."""
    if mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return {}
    return known_options(SEVERAL_GPUS)


def known_options(options: Mapping[str, bool | str]) -> dict[str, bool | str]:
    """Those of the options that the installed compiler knows: they come and go between its versions."""
    known: dict[str, bool | str] = {}
    for name, value in options.items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError as error:
            logger.warning("compiler option %s is left out: %s", name, str(error).splitlines()[0])
        else:
            known[name] = value
    return known


def keep_programs() -> Path | None:
    """Keep all programs of this process on disk, so that a second start compiles none of them; returns where.

    In $JAX_COMPILATION_CACHE_DIR, else in a folder of `cache_folder()`, one for each kind of processor, whose code may
    not run on another. What was not used for longest is removed beyond a gibibyte. Processes may share the folder, by a
    lock. Where it cannot be made, nothing is kept, and that is said. $JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named:
        folder = Path(named)
    else:
        kind = _processor() if jax.default_backend() == "cpu" else jax.default_backend()
        folder = cache_folder() / "compiled" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("%s: cannot be made (%s), so programs are compiled anew", folder, error.strerror)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _KEPT_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _processor() -> str:
    """A name for what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    )
    digest = hashlib.sha256("\n".join([platform.machine(), *(told or lines)]).encode()).hexdigest()
    return f"cpu-{digest[:16]}"


def use_compilation_cache(setting: str | None) -> Path | None:
    """Keep compiled steps on disk, so that a run that is started again need not compile; returns where, if anywhere.

    Args:
        setting: a folder; `auto`: $JAX_COMPILATION_CACHE_DIR, else one in `cache_folder()` on accelerators and
            none on a CPU, whose code may not run on another; empty or None for none.

    Raises:
        ConfigError: the folder that is asked for cannot be made.
    """
    if setting == AUTO:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])  # jax has read it
        if jax.default_backend() == "cpu":
            return None
        folder = cache_folder() / "compiled"
    elif not setting:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    else:
        folder = Path(setting)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"compilation_cache={setting}: cannot be made: {error.strerror}; give a folder that can, or null for"
                " none"
            ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
