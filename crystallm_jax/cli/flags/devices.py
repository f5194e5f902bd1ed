"""Flags of `crystallm sample` for several devices and several processes."""

import argparse
from collections.abc import Callable
from typing import Any

from crystallm_jax.cli.flags.prompts import positive


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


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)
