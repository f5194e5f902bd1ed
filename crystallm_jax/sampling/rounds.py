"""Engines side by side, each in a thread of its own, so that they compile together and all devices are kept busy.

What ended is handed on while the next round is under way: whatever is done with it costs the devices no time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import pairwise

from crystallm_jax.sampling.engine import Ended, Engine, Row
from crystallm_jax.sampling.requests import Orders, Wanted


def all_rounds(
    engines: Sequence[Engine],
    orders: Orders,
    *,
    first: Sequence[Wanted],
    rows_of: Callable[[Engine, Sequence[Wanted]], list[Row]],
) -> Iterator[list[Ended]]:
    """Let engines go on until there is no more to come; yields what ended, in whatever order.

    Args:
        engines: with empty places; at least one.
        orders: asked in the thread of the caller alone, for as many as an engine has places.
        first: was taken from the orders already; shared out evenly.
        rows_of: makes rows of them, in the thread of their engine.
    """
    shares = _shares(first, len(engines))
    resting, going = list(engines), dict[Future[list[Ended]], Engine]()
    ended: list[list[Ended]] = []
    with ThreadPoolExecutor(len(engines), thread_name_prefix="engine") as threads:
        while True:
            for engine in resting.copy():
                wanted = (shares.pop(0) if shares else []) or orders.take(engine.free)
                if wanted or engine.taken:
                    going[threads.submit(_round, engine, wanted, rows_of)] = engine
                    resting.remove(engine)
            if ended:
                yield from filter(None, ended)
                ended = []
            elif going:
                done, _ = wait(going, return_when=FIRST_COMPLETED)
                resting += [going.pop(future) for future in done]
                ended = [future.result() for future in done]
            elif not orders.wait():
                return


def _round(
    engine: Engine, wanted: Sequence[Wanted], rows_of: Callable[[Engine, Sequence[Wanted]], list[Row]]
) -> list[Ended]:
    if wanted:
        engine.admit(rows_of(engine, wanted))
    engine.start()
    return engine.finish()


def _shares(wanted: Sequence[Wanted], count: int) -> list[Sequence[Wanted]]:
    """So many parts of nearly the same size, neighbours together."""
    bounds = [len(wanted) * part // count for part in range(count + 1)]
    return [wanted[begin:end] for begin, end in pairwise(bounds)]
