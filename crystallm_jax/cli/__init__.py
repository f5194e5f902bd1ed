"""The command line: of each verb a module with its `run`, loaded when it is wanted, and one with its flags."""

import argparse
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import crystallm_jax
from crystallm_jax.cli.flags import add_verbs
from crystallm_jax.errors import CrystallmError
from crystallm_jax.signals import EXIT_INTERRUPTED, StoppedError, stop_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C.

    It is 75 after SIGTERM, and where another process of the run was lost: the same command goes on, `sample` with
    --resume.
    """
    parser = argparse.ArgumentParser(
        prog="crystallm", description="Crystal structures from a language model of CIF text."
    )
    parser.add_argument("--version", action="version", version=f"crystallm-jax {crystallm_jax.__version__}")
    add_verbs(parser.add_subparsers(dest="verb", required=True, metavar="VERB"))
    parsed, left = parser.parse_known_args(arguments)
    # argparse takes settings before the options or behind them, not both.
    if left and (not hasattr(parsed, "overrides") or any(re.match("-|[^=]*$", text) for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        parsed.overrides = [*parsed.overrides, *left]
    log_to_stderr()
    quiet_libtpu()
    try:
        with stop_at_once():
            return int(importlib.import_module(f"crystallm_jax.cli.{parsed.verb}").run(parsed))
    except CrystallmError as error:
        # A name with a line break would make two lines of it.
        print(f"crystallm {parsed.verb}: {' '.join(str(error).splitlines())}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except StoppedError as error:
        print(f"crystallm {parsed.verb}: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print(f"crystallm {parsed.verb}: interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED


def quiet_libtpu() -> None:
    """Where libtpu is installed, to compile for TPUs, but no accelerator plugged in, keep jax from looking for one.

    libtpu would complain of it in pages.
    """
    accelerators = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
    if importlib.util.find_spec("libtpu") and not any(any(Path("/dev").glob(name)) for name in accelerators):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def log_to_stderr() -> None:
    """Show this package's messages, and no library's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("crystallm_jax")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False
    # Checkpoints are read and written in its tasks; what fails there is raised, and would be told again, in pages.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
