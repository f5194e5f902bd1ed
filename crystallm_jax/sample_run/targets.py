"""Samples until enough of them are valid: which to make next, and which to keep."""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.requests import Wanted

# Samples for each valid one that is wanted, at most, where no limit is given.
DEFAULT_TRIES = 50


@dataclass(frozen=True)
class ValidTarget:
    """How many valid samples each prompt is to have.

    Attributes:
        valid: so many.
        limit: samples a prompt at most.
    """

    valid: int
    limit: int

    def __post_init__(self) -> None:
        if self.valid < 1:
            raise SamplingError(f"target_valid={self.valid}: must be at least 1")
        if self.limit < self.valid:
            raise SamplingError(f"limit_samples={self.limit}: fewer than target_valid={self.valid}; raise it")

    def kept(self, valid: Sequence[bool]) -> int:
        """How many of a prompt's samples are kept, given their verdicts in order: all up to the last wanted one."""
        found = 0
        for number, verdict in enumerate(valid[: self.limit], 1):
            found += verdict
            if found == self.valid:
                return number
        return min(len(valid), self.limit)


@dataclass
class _Prompt:
    """What is known of a prompt: verdicts by sample index, and the samples that are being made."""

    valid: dict[int, bool] = field(default_factory=dict)
    making: set[int] = field(default_factory=set)
    next: int = 0
    highest: int = -1
    # All samples below have their verdicts, so many of them a good one.
    settled: int = 0
    settled_valid: int = 0
    found: int = 0


class TargetOrders:
    """The samples that are still needed, those of a prompt in order of their index.

    More than needed are made at a time, by the share of the prompt's samples that were valid so far. What is kept in
    the end, all up to the last one that is needed (`ValidTarget.kept`), does not depend on that.

    Args:
        target: for each prompt.
        prompts: their indices, increasing.
    """

    def __init__(self, target: ValidTarget, prompts: Iterable[int]) -> None:
        self._target = target
        self._fresh = iter(prompts)
        self._open: dict[int, _Prompt] = {}
        self._closed: set[int] = set()
        # Those among the open ones that may need more samples, as a heap: one prompt is finished before the next.
        self._ready: list[int] = []

    @property
    def being_made(self) -> bool:
        """Whether any sample that was taken has no verdict yet."""
        return any(state.making for state in self._open.values())

    def judged(self, prompt_index: int, sample_index: int, *, valid: bool) -> None:
        """Note a verdict, of this run or of one before."""
        if prompt_index in self._closed:
            return
        state = self._open.setdefault(prompt_index, _Prompt())
        state.making.discard(sample_index)
        state.found += valid and sample_index not in state.valid
        state.valid[sample_index] = valid
        state.highest = max(state.highest, sample_index)
        while state.settled in state.valid and not self._is_settled(state):
            state.settled_valid += state.valid[state.settled]
            state.settled += 1
        if self._is_settled(state):
            # Whatever else is being made of it is not waited for.
            del self._open[prompt_index]
            self._closed.add(prompt_index)
        else:
            heapq.heappush(self._ready, prompt_index)

    def take(self, most: int) -> Sequence[Wanted]:
        """The next samples to make, at most so many."""
        taken: list[Wanted] = []
        while len(taken) < most:
            if not self._ready and not self._begin_next():
                break
            prompt = self._ready[0]
            state = self._open.get(prompt)
            if state is None or not self._has_need(state):
                heapq.heappop(self._ready)
                continue
            taken.append(Wanted(prompt, state.next))
            state.making.add(state.next)
            state.next += 1
        return taken

    def _begin_next(self) -> bool:
        prompt = next((index for index in self._fresh if index not in self._closed), None)
        if prompt is None:
            return False
        self._open.setdefault(prompt, _Prompt())
        heapq.heappush(self._ready, prompt)
        return True

    def _has_need(self, state: _Prompt) -> bool:
        while state.next in state.valid:
            state.next += 1
        if state.next >= self._target.limit:
            return False
        if state.next < state.highest:  # a gap that a killed run left
            return True
        # Before a verdict, half are taken to be valid.
        share = (state.found + 1) / (len(state.valid) + 2)
        return len(state.making) < math.ceil((self._target.valid - state.found) / share)

    def _is_settled(self, state: _Prompt) -> bool:
        return state.settled_valid == self._target.valid or state.settled == self._target.limit
