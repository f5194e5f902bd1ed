"""How several processes of `crystallm sample` sample together."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.distributed import join, parted, peers_watched, wait_for_all


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


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Part]:
    """Join the other processes of the run, if there are any, and end with them; before any device is touched.

    Raises:
        ConfigError: they cannot be found or do not come.
        PeerLostError: one is gone.
    """
    join(
        TrainConfig(
            distributed=arguments.distributed,
            coordinator_address=arguments.coordinator_address,
            num_processes=arguments.num_processes,
            process_id=arguments.process_id,
            local_device_ids=arguments.local_device_ids,
        )
    )
    with parted("sample"), peers_watched("--resume"):
        yield Part(jax.process_index(), jax.process_count(), wait_for_all)
        # The first writes the tables of all.
        wait_for_all("written")
