"""How much memory a run takes."""

import sys
from pathlib import Path

import jax


def memory_use() -> dict[str, int]:
    """`memory_bytes`, in use now, and `memory_peak_bytes`, at most so far.

    Of the fullest of this process's devices, where they count it; else (a CPU) of the process itself, as far as its
    system tells.
    """
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        return _process_memory()
    return {
        "memory_bytes": max(found.get("bytes_in_use", 0) for found in stats),
        "memory_peak_bytes": max(found.get("peak_bytes_in_use", 0) for found in stats),
    }


def _process_memory() -> dict[str, int]:
    try:
        import resource  # noqa: PLC0415 - POSIX only
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    pages = Path("/proc/self/statm")
    if pages.is_file():
        resident = int(pages.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
        # The kernel's two counters are not read at one time, and the peak is brought up to date late.
        found = {"memory_bytes": resident, "memory_peak_bytes": max(found["memory_peak_bytes"], resident)}
    return found
