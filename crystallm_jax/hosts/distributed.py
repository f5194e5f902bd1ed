"""Several processes as one run: how they join, which of them writes, what they share, how they part."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from crystallm_jax.errors import ConfigError, CrystallmError
from crystallm_jax.hosts.cluster import JoinSettings, Plan, find_machine, make_plan
from crystallm_jax.signals import EXIT_AGAIN, StoppedError

# Seconds: until all must have come, until one that no longer answers is given up (and the others with it), and how
# long those that end wait for each other.
INITIALIZATION_TIMEOUT_S = 300
HEARTBEAT_TIMEOUT_S = 60
SHUTDOWN_TIMEOUT_S = 60
# How long a process that failed waits for others to fail alike before it leaves them.
LEAVE_TIMEOUT_S = 10

_MEND = "set coordinator_address=HOST:PORT, num_processes and process_id, or distributed=off for one process"

logger = logging.getLogger(__name__)


class PeerLostError(CrystallmError):
    """Another process of the run is gone; what is saved can be gone on with."""

    exit_code = EXIT_AGAIN


def join(config: JoinSettings) -> None:
    """Join the other processes of the run, if there are any; before any device is touched.

    Raises:
        ConfigError: they cannot be found or do not come.
    """
    if jax.distributed.is_initialized():
        return
    plan = make_plan(config, os.environ, find_machine(os.environ))
    if not plan.joins:
        logger.debug("one process: %s", plan.why)
        return
    complete = None not in (plan.coordinator_address, plan.num_processes, plan.process_id)
    if plan.process_id == 0 and plan.coordinator_address is not None:
        _check_port(plan.coordinator_address)
    # jax puts a handler of its own in the place of what Python knows of: it would swallow the signal.
    handler = signal.getsignal(signal.SIGTERM)
    waiting = threading.Timer(INITIALIZATION_TIMEOUT_S, _give_up, [plan])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            plan.coordinator_address,
            plan.num_processes,
            plan.process_id,
            None if plan.local_device_ids is None else list(plan.local_device_ids),
            # jax would look for a cluster even so, and then take one GPU.
            cluster_detection_method="deactivate" if complete else None,
            # Where jax's own patience ends it aborts, with its stack.
            initialization_timeout=2 * INITIALIZATION_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(f"cannot join other processes ({plan.why}): {reason}; {_MEND}") from None
    finally:
        waiting.cancel()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    # Silenced once it is known which process this is; its number may be known to the cluster alone.
    owned = "all" if plan.local_device_ids is None else ",".join(map(str, plan.local_device_ids))
    if is_writer():
        logger.info(
            "%s: process 0 of %d, devices %s of those it sees, %d of %d",
            plan.why,
            jax.process_count(),
            owned,
            jax.local_device_count(),
            jax.device_count(),
        )
    else:
        logging.getLogger("crystallm_jax").setLevel(logging.WARNING)


def _check_port(address: str) -> None:
    """Refuse a port that is taken: jax would crash on it."""
    port = int(address.rsplit(":", 1)[1])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ConfigError(
            f"coordinator_address={address}: process 0 cannot listen there: {error.strerror}; choose another port"
        ) from None


def _give_up(plan: Plan) -> None:
    """End a process that has waited for the others in vain; the thread that waits cannot be woken."""
    if plan.process_id is None or plan.num_processes is None:
        which = "this process"
    else:
        which = f"process {plan.process_id} of {plan.num_processes}"
    where = "" if plan.coordinator_address is None else f" at {plan.coordinator_address}"
    logger.error(
        "%s has waited %d s for the others%s (%s): start them all, with addresses that they can reach, or set"
        " distributed=off",
        which,
        INITIALIZATION_TIMEOUT_S,
        where,
        plan.why,
    )
    sys.stderr.flush()
    os._exit(ConfigError.exit_code)


def is_writer() -> bool:
    """Whether this is the process that writes files and speaks, of all that train together."""
    return jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Go on when every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


class Share(NamedTuple):
    """Which part of every batch a process reads: of `hosts` equal parts that of number `host`."""

    host: int
    hosts: int


def batch_share(sharding: Sharding, batch_size: int) -> Share:
    """This process's share of batches [B, ...]; processes whose devices hold the same rows read the same.

    Raises:
        ConfigError: devices of several processes hold rows that overlap but differ.
    """
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = sharding.devices_indices_map((batch_size, 1))
    for device, index in places.items():
        rows.setdefault(device.process_index, set()).update(range(*index[0].indices(batch_size)))
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != batch_size or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"the {len(rows)} processes cannot share batches evenly: let fsdp × tensor be a multiple or a divisor"
            " of the devices of a process"
        )
    return Share(parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts))


def sum_of_all(numbers: list[int]) -> np.ndarray:
    """Sums over the processes, number by number."""
    return multihost_utils.process_allgather(np.array(numbers, np.int32)).sum(axis=0, dtype=np.int64)


class LateMaximum:
    """The greatest of a number over all processes, one call late.

    Each call queues a tiny reduction behind what the devices are doing and fetches that of the call before: nothing
    waits, and every process gets the same answer at the same call.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._reduce = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._queued: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Give this process's number; returns the greatest of the call before, 0 at the first."""
        numbers = np.full(jax.local_device_count(), number, np.int32)
        before = self._queued
        self._queued = self._reduce(jax.make_array_from_process_local_data(self._sharding, numbers))
        return 0 if before is None else int(before)


@contextlib.contextmanager
def peers_watched(again: str = "existing_run=resume") -> Iterator[None]:
    """Say in one line that another process is gone, where a collective operation fails, and to start all `again` so.

    Raises:
        PeerLostError: it is.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # On CPUs a peer that closed its connection in order is a plain ValueError.
        of_devices = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if not of_devices or jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise PeerLostError(
            f"process {jax.process_index()} of {jax.process_count()} has lost another, whose own messages say why"
            f" ({str(error).splitlines()[0]}); start all again with {again}"
        ) from error


@contextlib.contextmanager
def parted(verb: str) -> Iterator[None]:
    """End this process at once when it alone fails or stops: waiting for the others, it would keep them waiting."""
    try:
        yield
    except (Exception, StoppedError) as error:
        agreed = isinstance(error, StoppedError) and error.agreed
        if agreed or not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        if isinstance(error, CrystallmError | StoppedError):
            logger.error("crystallm %s: %s", verb, " ".join(str(error).splitlines()))
            code = error.exit_code
        else:
            traceback.print_exc()
            code = 1
        # Where all fail alike they part in order.
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        if not isinstance(error, PeerLostError):
            parting.start()
            parting.join(LEAVE_TIMEOUT_S)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
