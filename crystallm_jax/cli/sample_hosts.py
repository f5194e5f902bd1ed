"""How several processes of `crystallm sample` sample together."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from crystallm_jax.hosts.distributed import join, parted, peers_watched, wait_for_all


@dataclass(frozen=True)
class Part:
    """Which part of a run this process samples: prompts `number`, `number + count`, ...

    Attributes:
        number: of this process.
        count: how many there are.
        barrier: waits until all have reached the point of this name.
    """

    number: int
    count: int
    barrier: Callable[[str], object]

    def has(self, prompt_index: int) -> bool:
        """Whether the prompt is its own."""
        return prompt_index % self.count == self.number


@dataclass(frozen=True)
class _Hosts:
    """What the flags say of the processes of the run, as `hosts.cluster.JoinSettings` has it."""

    distributed: str
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: str | None


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Part]:
    """Join the other processes of the run, if there are any, and end with them; before any device is touched.

    Raises:
        ConfigError: they cannot be found or do not come.
        PeerLostError: one is gone.
    """
    join(
        _Hosts(
            arguments.distributed,
            arguments.coordinator_address,
            arguments.num_processes,
            arguments.process_id,
            arguments.local_device_ids,
        )
    )
    with parted("sample"), peers_watched("--resume"):
        yield Part(jax.process_index(), jax.process_count(), wait_for_all)
        # The first writes the tables of all.
        wait_for_all("written")
