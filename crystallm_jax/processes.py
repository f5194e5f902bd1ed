"""Processes: how many workers, and how they start."""

import multiprocessing
import os
from multiprocessing.context import SpawnContext

# Spawned, never forked: JAX may have started threads, which a forked child would find dead.
SPAWN: SpawnContext = multiprocessing.get_context("spawn")


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
