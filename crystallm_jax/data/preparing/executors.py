"""Where records are prepared: in this process, in worker processes, or on a Ray cluster.

Each way takes batches of records and yields them with their outcomes, in the order in which they came, with at most
a few batches a worker in memory. A record that takes longer than the time limit, or whose worker dies, is dropped
alone: its batch is done again one by one.
"""

import dataclasses
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

from pebble import ProcessExpired, ProcessPool

from crystallm_jax.data.preparing.pipeline import Dropped, Outcome, Recipe, prepare_batch, warm_up
from crystallm_jax.data.record import Record
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.processes import SPAWN, usable_cores

_IN_FLIGHT = 4
# Of texts, far more than crystals have: with such a lot no further batches are taken before it shrinks.
_MOST_CHARACTERS = 64 * 2**20
_RAY_RETRIES = 3
_MOST_BREAKS = 3
_LOOK_SECONDS = 1.0
_KNOCK_SECONDS = 10.0

Batch: TypeAlias = Sequence[Record]


class Done(NamedTuple):
    """A batch and what became of each of its records."""

    batch: Batch
    outcomes: list[Outcome]


Results: TypeAlias = Generator[Done, None, None]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where and how fast records are prepared; nothing that is written depends on it but for the time limit.

    Attributes:
        workers: processes; None for one a usable core (on Ray: one a CPU of the cluster), 0 for none, and then no
            time limit either. Workers are spawned, so a script must prepare under `if __name__ == "__main__":`.
        time_limit: seconds that one record may take.
        executor: `local` for this machine, `ray` for a cluster; every node needs the package.
        ray_address: of the cluster; None for that of `RAY_ADDRESS`, or a local one that is started.
    """

    workers: int | None = None
    time_limit: float = 60.0
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise ConfigError(f"a time limit of {self.time_limit} s: give one above 0, such as 60")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"{self.workers} workers: give a number of processes, 0 for none")
        if self.executor == "ray" and self.workers == 0:
            raise ConfigError("0 workers and the executor ray: give at least 1, or --executor local")


def run(batches: Iterator[Batch], recipe: Recipe, execution: Execution) -> Results:
    """Prepare batches where `execution` says.

    Raises:
        DataError: the workers cannot start or were all lost, or Ray is not installed.
    """
    if execution.executor == "ray":
        return _on_ray(batches, recipe, execution)
    if execution.workers == 0:
        return (Done(batch, prepare_batch(batch, recipe)) for batch in batches)
    return _in_processes(batches, recipe, execution)


class _Ticket(NamedTuple):
    """A batch under way: the pool that has it, and its result to come."""

    pool: ProcessPool
    future: "Future[list[Outcome]]"


class _Workers:
    """Worker processes with a hard time limit a record."""

    def __init__(self, recipe: Recipe, *, workers: int, time_limit: float) -> None:
        self._recipe = recipe
        self._time_limit = time_limit
        self._count = workers
        self._pool = self._start()
        self._breaks = 0

    def submit(self, batch: Batch) -> _Ticket:
        """Start a batch, which has the time of one record: all of them take milliseconds."""
        try:
            future = self._pool.schedule(prepare_batch, args=(batch, self._recipe), timeout=self._time_limit)
        except RuntimeError as error:  # the pool is broken
            self._replace(self._pool, error)
            return self.submit(batch)
        return _Ticket(self._pool, future)

    def settle(self, batch: Batch, ticket: _Ticket, *, again: bool = False) -> list[Outcome]:
        """Wait for a batch; one that failed is done again record by record, unless this is done `again`."""
        error = self._error(ticket)
        if error is None:
            self._breaks = 0
            return ticket.future.result()
        if isinstance(error, BrokenProcessPool):
            self._replace(ticket.pool, error)
            return self.settle(batch, self.submit(batch), again=again)
        if len(batch) > 1:
            retries = [((record,), self.submit((record,))) for record in batch]
            return [outcome for one, retry in retries for outcome in self.settle(one, retry)]
        if isinstance(error, ProcessExpired) and not again:  # perhaps it was killed from outside
            return self.settle(batch, self.submit(batch), again=True)
        return [Dropped("limit", _why(error, self._time_limit))]

    def close(self) -> None:
        """Stop all at once."""
        self._pool.stop()
        self._pool.join()

    def _start(self) -> ProcessPool:
        return ProcessPool(max_workers=self._count, initializer=warm_up, context=SPAWN)

    def _error(self, ticket: _Ticket) -> BaseException | None:
        """What a batch failed with, when it is done; a broken pool does not tell all that wait for it."""
        while not ticket.future.done():
            wait((ticket.future,), timeout=_LOOK_SECONDS)
            if not ticket.pool.active and not ticket.future.done():
                return BrokenProcessPool("the workers are gone")
        return ticket.future.exception()

    def _replace(self, broken: ProcessPool, error: BaseException) -> None:
        """A new pool for one that gave up, as it does when a worker is killed that has nothing to do yet.

        Raises:
            DataError: several gave up one after another, and nothing was done between.
        """
        if broken is not self._pool:
            return
        self._breaks += 1
        if self._breaks > _MOST_BREAKS:
            raise _broken(error) from error
        self.close()
        self._pool = self._start()


def _in_processes(batches: Iterator[Batch], recipe: Recipe, execution: Execution) -> Results:
    count = usable_cores() if execution.workers is None else execution.workers
    workers = _Workers(recipe, workers=count, time_limit=execution.time_limit)
    try:
        yield from _in_order(batches, submit=workers.submit, settle=workers.settle, workers=count)
    finally:
        workers.close()


def _in_order(
    batches: Iterator[Batch],
    *,
    submit: Callable[[Batch], Any],
    settle: Callable[[Batch, Any], list[Outcome]],
    workers: int,
) -> Results:
    """Keep a few batches a worker under way, and yield them in their order."""
    pending: deque[tuple[Batch, Any]] = deque()
    characters = 0
    for batch in batches:
        pending.append((batch, submit(batch)))
        characters += _characters(batch)
        while len(pending) >= _IN_FLIGHT * workers or (pending and characters > _MOST_CHARACTERS):
            first, waiting = pending.popleft()
            characters -= _characters(first)
            yield Done(first, settle(first, waiting))
    while pending:
        first, waiting = pending.popleft()
        yield Done(first, settle(first, waiting))


def _characters(batch: Batch) -> int:
    return sum(len(record.text) for record in batch)


class _RayWorker:
    """One CPU of a cluster: a process of its own does the work, so that the time limit is as hard as elsewhere."""

    def __init__(self, recipe: Recipe, time_limit: float) -> None:
        self._workers = _Workers(recipe, workers=1, time_limit=time_limit)

    def prepare(self, batch: Batch) -> list[Outcome]:
        return self._workers.settle(batch, self._workers.submit(batch))


def _on_ray(batches: Iterator[Batch], recipe: Recipe, execution: Execution) -> Results:
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        try:
            _knock(execution.ray_address)
            ray.init(address=execution.ray_address, log_to_driver=False, include_dashboard=False)
        except (OSError, OverflowError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"no Ray cluster at {execution.ray_address or 'the default address'} ({reason}): start one with "
                "'ray start', or leave out --ray-address"
            ) from error
    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        count = cpus if execution.workers is None else min(execution.workers, cpus)
        actor = ray.remote(num_cpus=1, max_restarts=_RAY_RETRIES, max_task_retries=_RAY_RETRIES)(_RayWorker)
        pool = ray.util.ActorPool([actor.remote(recipe, execution.time_limit) for _ in range(count)])

        def submit(batch: Batch) -> None:
            pool.submit(lambda worker, records: worker.prepare.remote(records), batch)

        def settle(batch: Batch, waiting: None) -> list[Outcome]:  # noqa: ARG001  the pool keeps their order
            try:
                return pool.get_next()
            except ray.exceptions.RayError as error:
                raise DataError(
                    f"the Ray cluster lost its workers ({type(error).__name__}): look at its nodes, then run the "
                    "same command again: it goes on where it was"
                ) from error

        yield from _in_order(batches, submit=submit, settle=settle, workers=count)
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str | None) -> None:
    """See whether something answers at HOST:PORT, where Ray itself would try for many minutes.

    Raises:
        OSError: nothing does.
        OverflowError: the port is none.
    """
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _ray() -> ModuleType:
    try:
        import ray  # noqa: PLC0415  an extra
        import ray.util  # noqa: PLC0415
    except ImportError as error:
        raise DataError(
            "the executor ray needs Ray, which is not installed: pip install 'crystallm-jax[ray]', or leave out "
            "--executor"
        ) from error
    return ray


def _why(error: BaseException, time_limit: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no result in {time_limit:g} s: raise --time-limit or leave it out"
    return f"the worker process ended ({type(error).__name__}: {' '.join(str(error).split())}): leave it out"


def _broken(error: BaseException) -> DataError:
    return DataError(
        f"the worker processes cannot start or were all killed ({error}): give fewer --workers; "
        "a script calls prepare under 'if __name__ == \"__main__\":'"
    )
