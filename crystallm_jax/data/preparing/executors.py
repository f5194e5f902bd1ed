"""Where records are prepared: in this process, in worker processes, or on a Ray cluster.

Each way takes batches of records and yields them with their outcomes, in the order in which they came, with at most
a few batches a worker in memory. A record that takes longer than the time limit, or whose worker dies, is dropped
alone: its batch is done again one by one.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

from pebble import ProcessPool

from crystallm_jax.data.preparing.pipeline import Dropped, Outcome, Recipe, prepare_batch, warm_up
from crystallm_jax.data.record import Record
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.processes import SPAWN, usable_cores

_IN_FLIGHT = 4
_RAY_RETRIES = 3

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


class _Workers:
    """Worker processes with a hard time limit a record."""

    def __init__(self, recipe: Recipe, *, workers: int, time_limit: float) -> None:
        self._recipe = recipe
        self._time_limit = time_limit
        self._pool = ProcessPool(max_workers=workers, initializer=warm_up, context=SPAWN)

    def submit(self, batch: Batch) -> "Future[list[Outcome]]":
        """Start a batch, which has the time of one record: all of them take milliseconds."""
        try:
            return self._pool.schedule(prepare_batch, args=(batch, self._recipe), timeout=self._time_limit)
        except RuntimeError as error:  # the pool is broken
            raise _broken(error) from error

    def settle(self, batch: Batch, future: "Future[list[Outcome]]") -> list[Outcome]:
        """Wait for a batch; one that failed is done again record by record."""
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, BrokenProcessPool):
            raise _broken(error) from error
        if len(batch) > 1:
            retries = [((record,), self.submit((record,))) for record in batch]
            return [outcome for one, retry in retries for outcome in self.settle(one, retry)]
        return [Dropped("limit", _why(error, self._time_limit))]

    def close(self) -> None:
        """Stop all at once."""
        self._pool.stop()
        self._pool.join()


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
    for batch in batches:
        pending.append((batch, submit(batch)))
        if len(pending) >= _IN_FLIGHT * workers:
            first, waiting = pending.popleft()
            yield Done(first, settle(first, waiting))
    while pending:
        first, waiting = pending.popleft()
        yield Done(first, settle(first, waiting))


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
            ray.init(address=execution.ray_address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
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
