"""Flags of `crystallm sample` for several devices and several processes, and how processes sample together."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from crystallm_jax.cli.sample_prompts import positive


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


def add_device_flags(add: Callable[..., Any]) -> None:
    """Add the flags, whose meaning is that of the keys of training."""
    add(
        "--tensor",
        type=positive,
        default=1,
        metavar="N",
        help="devices that each replica of the model is split over; all devices are used (default: %(default)s)",
    )
    add(
        "--distributed",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether several processes sample together, each its own prompts, into one folder that all can write"
        " (default: as the cluster says)",
    )
    add("--coordinator-address", metavar="HOST:PORT", help="of process 0, where the cluster does not say it")
    add("--num-processes", type=positive, metavar="N", help="likewise")
    add("--process-id", type=_number, metavar="K", help="which of them this is, likewise")
    add("--local-device-ids", metavar="I,J", help="GPUs of this process (default: all that it sees)")


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Part]:
    """Join the other processes of the run, if there are any, and end with them; before any device is touched.

    Raises:
        ConfigError: they cannot be found or do not come.
        PeerLostError: one is gone.
    """
    from crystallm_jax.hosts.distributed import join, parted, peers_watched, wait_for_all  # noqa: PLC0415

    join(
        _Hosts(
            arguments.distributed,
            arguments.coordinator_address,
            arguments.num_processes,
            arguments.process_id,
            arguments.local_device_ids,
        )
    )
    import jax  # noqa: PLC0415

    with parted("sample"), peers_watched("--resume"):
        yield Part(jax.process_index(), jax.process_count(), wait_for_all)
        # The first writes the tables of all.
        wait_for_all("written")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)
