"""Validation by worker processes that are spawned, limited in time and memory, and replaced when they die."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from crystallm_jax.errors import ConfigError
from crystallm_jax.evaluation.verdict import Judgement, ValidityReport, failed
from crystallm_jax.processes import SPAWN, usable_cores

GRACE = 5.0  # seconds; validate itself should end first, with a fuller report
MEMORY = 4 * 1024**3  # bytes of address space over what a fresh worker has
ENDING = 30.0  # seconds that the end of the workers may take; each is killed after 3
AHEAD = 8  # texts waiting for each worker
STOPPED = "the pool was stopped before this text was judged"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

T = TypeVar("T")


class ValidatorPool:
    """Worker processes that validate texts; a context manager.

    Processes are spawned, never forked: JAX may have started threads. A script that uses a pool guards its
    entry with `if __name__ == "__main__":`, as all spawning needs. A worker that exceeds the time limit or
    dies is replaced, and its text gets a report with the reason "timeout" or "crashed".
    """

    def __init__(self, workers: int | None = None, time_limit: float = 60.0) -> None:
        """Prepares the pool; the processes start with the first text.

        Args:
            workers: Number of processes; None for one a core that this process may use.
            time_limit: Seconds a text; a worker that has not answered 5 seconds later is killed.

        Raises:
            ConfigError: Fewer than 1 worker, or a time limit that is not positive.
        """
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}: use at least 1")
        if not time_limit > 0:
            raise ConfigError(f"time_limit is {time_limit}: use a positive number of seconds")
        self.workers = workers or usable_cores()
        self.time_limit = time_limit
        self._pool = ProcessPool(
            max_workers=self.workers,
            initializer=_prepare_worker,
            context=SPAWN,
        )
        # Futures without a result, each with what makes a result of the report on a text that had no verdict.
        self._open: dict[Future[Any], Callable[[ValidityReport], Any]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> ValidatorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the texts submitted; after an error, stops the workers at once."""
        if kind is not None:
            self.stop()
        else:
            self._pool.close()
            self._pool.join()

    def submit(self, text: str) -> Future[ValidityReport]:
        """A future of the report on a text. Its result raises only if the future itself was cancelled."""
        return self._schedule(_validate, text, self.time_limit)

    def judge(self, text: str) -> Future[Judgement]:
        """A future of the report on a text and of its structure for other programs, as `submit` otherwise."""
        return self._schedule_for(Judgement, _judge, text, self.time_limit)

    def stop(self) -> None:
        """Ends the workers at once; texts not yet judged get a report with the reason "crashed"."""
        self._pool.stop()
        # Joined by a thread that may be left behind: whatever its threads wait for, the run goes on to its end.
        ending = threading.Thread(target=self._pool.join, name="pool_end", daemon=True)
        ending.start()
        ending.join(ENDING)
        # pebble leaves a task open that no worker had taken yet.
        for outcome, without_verdict in tuple(self._open.items()):
            self._settle(outcome, without_verdict(failed("crashed", STOPPED)))

    def _schedule(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._schedule_for(_itself, function, *arguments)

    def _schedule_for(
        self, without_verdict: Callable[[ValidityReport], T], function: Callable[..., T], *arguments: Any
    ) -> Future[T]:
        outcome: Future[T] = Future()
        self._open[outcome] = without_verdict
        task = self._pool.schedule(function, args=arguments, timeout=self.time_limit + GRACE)
        task.add_done_callback(lambda done: self._settle(outcome, self._result(done, without_verdict)))
        return outcome

    def _settle(self, outcome: Future[T], result: T) -> None:
        """Gives a future its result, once."""
        with self._lock:
            if self._open.pop(outcome, None) is None:
                return
        if outcome.set_running_or_notify_cancel():
            outcome.set_result(result)

    def _result(self, task: Future[T], without_verdict: Callable[[ValidityReport], T]) -> T:
        """The result of a task, or what stands for one that came to none."""
        try:
            return task.result()
        except TimeoutError:
            report = failed("timeout", f"no verdict within {self.time_limit:g} seconds: the worker was ended")
        except ProcessExpired as error:
            report = failed(
                "crashed", f"the worker died (exit code {error.exitcode}): the text may need too much memory"
            )
        except (CancelledError, BrokenProcessPool):
            report = failed("crashed", STOPPED)
        except Exception as error:  # noqa: BLE001 - kept: its class and message go into the report
            report = failed("crashed", f"the worker failed ({type(error).__name__}: {error})")
        return without_verdict(report)


def validate_many(
    texts: Iterable[str], *, workers: int | None = None, time_limit: float = 60.0, progress: bool = False
) -> Iterator[ValidityReport]:
    """Yields the reports on texts, in their order.

    Only some texts a worker are read ahead, so that a generator of millions needs little memory.

    Args:
        texts: CIF texts, raw or post-processed.
        workers: Number of processes; None for one a core.
        time_limit: Seconds a text.
        progress: Shows a bar on a terminal; a log stays quiet.
    """
    total = len(texts) if isinstance(texts, Sized) else None
    with (
        ValidatorPool(workers, time_limit) as pool,
        tqdm(
            total=total, desc="validate", unit="CIF", file=sys.stderr, disable=None if progress else True
        ) as bar,
    ):
        pending: deque[Future[ValidityReport]] = deque()
        for text in texts:
            pending.append(pool.submit(text))
            if len(pending) >= AHEAD * pool.workers:
                yield pending.popleft().result()
                bar.update()
        while pending:
            yield pending.popleft().result()
            bar.update()


def _validate(text: str, time_limit: float) -> ValidityReport:
    from crystallm_jax.evaluation.validity import validate  # noqa: PLC0415 - only workers need pymatgen

    return validate(text, time_limit=time_limit)


def _judge(text: str, time_limit: float) -> Judgement:
    from crystallm_jax.evaluation.judging import judge  # noqa: PLC0415 - only workers need pymatgen

    return judge(text, time_limit=time_limit)


def _itself(report: ValidityReport) -> ValidityReport:
    return report


def _prepare_worker() -> None:
    """Limits a fresh worker to one thread and some memory, and loads what it needs before the clock runs."""
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")
    from crystallm_jax.evaluation import judging  # noqa: F401, PLC0415 - after the threads are set

    _limit_memory()


def _limit_memory() -> None:
    """Lets the process grow by 4 GiB at most, on Linux; beyond that a MemoryError is raised."""
    try:
        import resource  # noqa: PLC0415 - POSIX only

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        return  # no Linux: the time limit alone holds
    limit = pages * resource.getpagesize() + MEMORY
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
