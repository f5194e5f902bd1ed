"""What is asked of the engine: how to sample, which samples in which order, and what comes of each."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, Protocol

from crystallm_jax.errors import SamplingError
from crystallm_jax.model.config import DType
from crystallm_jax.sampling.constrain import Level
from crystallm_jax.sampling.methods import SamplingMethod


class Completion(NamedTuple):
    """One completed prompt.

    Attributes:
        prompt_index: which prompt, in the order given.
        sample_index: which of its samples.
        token_ids: prompt and generated tokens.
        log_prob: log-probability in nats of the generated tokens under the model (temperature 1, all tokens).
        finished: whether the text came to its end (two newlines) before a limit.
        seconds: from its beginning in a batch to its end.
        returns: how often it went back, as its cell or a site could not stay.
        unplaced: whether it was given up, as its atoms found no place; it is not finished then.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    log_prob: float
    finished: bool
    seconds: float = 0.0
    returns: int = 0
    unplaced: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """What to sample, apart from the prompts.

    Attributes:
        method: how tokens are drawn.
        num_samples: samples a prompt.
        max_new_tokens: most tokens to add to a prompt; None goes on to the context's end.
        seed: of all randomness.
        batch_size: rows decoded together, over all devices; it changes no sample. None takes 64 for each replica of
            the model on a CPU, 512 elsewhere.
        tensor: devices that a replica of the model is split over; there are as many replicas as the devices allow.
            It changes no sample but for rounding.
        overflow: `stop` ends a sample unfinished where the context ends; `slide` goes on as the published
            generator does, uncached and slow.
        constrain: what every sample is held to: `syntax` of the dialect, the prompt's `composition` too, the
            stated space group's `symmetry` as well, or also the `positions` of its atoms; None holds it to nothing.
        cache_dtype: of the keys and values kept; None takes the model's. `bfloat16` halves the memory and what a
            step reads.
    """

    method: SamplingMethod = field(default_factory=SamplingMethod)
    num_samples: int = 1
    max_new_tokens: int | None = None
    seed: int = 0
    batch_size: int | None = None
    overflow: Literal["stop", "slide"] = "stop"
    constrain: Level | None = None
    cache_dtype: DType | None = None
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "max_new_tokens", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SamplingError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise SamplingError(f"seed={self.seed}: must be at least 0 and below 2**32")
        if self.overflow not in ("stop", "slide"):
            raise SamplingError(f"overflow={self.overflow!r}: must be 'stop' or 'slide'")


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
