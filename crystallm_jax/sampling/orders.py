"""Which samples to make, and in which order: asked by the engine whenever it has room for more rows."""

from collections.abc import Collection, Sequence
from itertools import islice
from typing import NamedTuple, Protocol


class Wanted(NamedTuple):
    """One sample to make.

    Attributes:
        prompt_index: of which prompt.
        sample_index: the how-manieth of its samples; what it becomes depends on it.
        max_new_tokens: most tokens to add; None takes the request's.
    """

    prompt_index: int
    sample_index: int
    max_new_tokens: int | None = None


class Orders(Protocol):
    """Where the engine gets its work."""

    def take(self, most: int) -> Sequence[Wanted]:
        """The next samples to make, at most so many; fewer or none where no more are ready now."""
        ...

    def wait(self) -> bool:
        """Called when nothing is being made and `take` gave nothing.

        Returns when `take` may give more: True; or False when there is no more to come.
        """
        ...


class EverySample:
    """So many samples of each prompt, one prompt after the other, without those that are there already.

    Args:
        counts: samples of each prompt.
        done: pairs of prompt and sample index to leave out.
    """

    def __init__(self, counts: Sequence[int], done: Collection[tuple[int, int]] = ()) -> None:
        self._rest = (
            Wanted(prompt, sample)
            for prompt, count in enumerate(counts)
            for sample in range(count)
            if (prompt, sample) not in done
        )

    def take(self, most: int) -> Sequence[Wanted]:
        """The next samples, at most so many."""
        return list(islice(self._rest, most))

    def wait(self) -> bool:
        """Nothing comes later: False."""
        return False
