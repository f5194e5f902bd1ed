"""Samples from the network: the same draws as the JAX model's, a batch of rows at a time.

Rows begin together and leave the batch as they end. What a sample draws is a function of the seed, its prompt and its
number, by the keys of `crystallm_jax.sampling.keys`.
"""

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from crystallm_jax.errors import SamplingError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.numpy_model.network import Cache, Network, Reading, empty_cache, read_text, step
from crystallm_jax.numpy_model.threefry import fold_in, gumbel, root_key

# Rows decoded together unless told: what fills a processor, and keys and values of so many bytes at most.
_MOST_ROWS, _CACHE_BYTES = 32, 1 << 30
_NO_TOKEN = -1


@dataclass(frozen=True)
class Request:
    """What to sample, apart from the prompts.

    Attributes:
        num_samples: samples a prompt.
        temperature: logits are divided by it; above 0.
        top_k: only the k most likely tokens, and those that tie with the k-th, can be drawn; None draws from all, 1 is
            greedy.
        max_new_tokens: most tokens to add to a prompt; None goes on to the context's end.
        seed: of all randomness.
        batch_size: rows decoded together; None takes 32, or what fits into a gibibyte of keys and values.
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_k: int | None = 10
    max_new_tokens: int | None = None
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SamplingError(f"{name}={value}: must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise SamplingError(
                f"temperature={self.temperature}: must be above 0 and finite; for the most likely token use top_k=1"
            )
        if not 0 <= self.seed < 2**32:
            raise SamplingError(f"seed={self.seed}: must be at least 0 and below 2**32")


class Completion(NamedTuple):
    """One completed prompt; the fields are those of a `Sample`."""

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    log_prob: float
    finished: bool
    seconds: float


class Wanted(NamedTuple):
    """A sample to make: its names, its prompt int [T], its key uint32 [2], and the tokens that it may have in all."""

    prompt_index: int
    sample_index: int
    prompt: np.ndarray
    key: np.ndarray
    limit: int


class Rows(NamedTuple):
    """The rows of a batch in the middle of their texts; all arrays begin with B.

    Attributes:
        number: which of the wanted samples it is.
        tokens: int32 [B, T]; anything beyond `length`.
        length: tokens so far, the prompt's included.
        limit: tokens at which a row stops unfinished.
        previous: the newest generated token, -1 where there is none.
        log_prob: of the generated tokens, summed, in nats.
        keys: uint32 [B, 2].
        logits: float32 [B, V]; of the token that comes next.
    """

    number: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    limit: np.ndarray
    previous: np.ndarray
    log_prob: np.ndarray
    keys: np.ndarray
    logits: np.ndarray


def complete(
    network: Network, prompts: Sequence[np.ndarray], *, newline_id: int, request: Request
) -> Iterator[Completion]:
    """Complete prompts of token ids (int [T] each), yielding completions as they are done.

    Args:
        network: as prepared.
        prompts: of at least a token each.
        newline_id: the token of which two generated ones in a row end a sample.
        request: how to sample.

    Raises:
        SamplingError: a prompt is empty or leaves no room in the context.
    """
    config = network.config
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.block_size:
            raise SamplingError(
                f"prompt {index} has {len(prompt)} tokens; the model's context takes 1 to {config.block_size}"
            )
    wanted = _wanted(prompts, request, config)
    rows = request.batch_size or default_batch_size(config)
    readings: dict[bytes, Reading] = {}
    for begin in range(0, len(wanted), rows):
        batch = wanted[begin : begin + rows]
        readings = _readings(network, batch, readings)
        yield from _complete_batch(network, batch, readings, newline_id=newline_id, request=request)


def default_batch_size(config: ModelConfig) -> int:
    """Rows decoded together unless told."""
    bytes_a_row = 2 * config.n_layer * config.block_size * config.n_embd * np.dtype(np.float32).itemsize
    return max(1, min(_MOST_ROWS, _CACHE_BYTES // bytes_a_row))


def sample_keys(prompts: Sequence[np.ndarray], num_samples: int, seed: int) -> np.ndarray:
    """The keys of samples, uint32 [prompts, num_samples, 2].

    They depend on the seed, the prompt's tokens, how often that prompt came before in the list, and the sample's
    number.
    """
    seen: dict[bytes, int] = {}
    names = np.zeros((len(prompts), 2), np.uint32)
    for index, prompt in enumerate(prompts):
        content = np.asarray(prompt, "<u2").tobytes()
        occurrence = seen[content] = seen.get(content, -1) + 1
        names[index] = zlib.crc32(content), occurrence
    of_prompts = fold_in(fold_in(root_key(seed), names[:, 0]), names[:, 1])
    return fold_in(of_prompts[:, None], np.arange(num_samples, dtype=np.uint32))


def draw(logits: np.ndarray, keys: np.ndarray, *, temperature: float, top_k: int | None) -> np.ndarray:
    """One token for each row of logits [B, V], int [B], row b by keys[b] alone.

    Greedy takes the first of the most likely tokens.
    """
    if top_k == 1:
        return logits.argmax(-1)
    B, V = logits.shape
    scaled = logits / np.float32(temperature)
    if top_k is None or top_k >= V:
        return (scaled + gumbel(keys, np.arange(V))).argmax(-1)
    least = np.partition(scaled, V - top_k, axis=-1)[:, V - top_k, None]
    allowed = scaled >= least
    tokens = allowed.nonzero()[1]
    if len(tokens) > B * top_k:
        # Tokens that tie with the k-th.
        return np.where(allowed, scaled + gumbel(keys, np.arange(V)), -np.inf).argmax(-1)
    candidates = tokens.reshape(B, top_k)
    best = (np.take_along_axis(scaled, candidates, 1) + gumbel(keys, candidates)).argmax(-1)
    return candidates[np.arange(B), best]


def _wanted(prompts: Sequence[np.ndarray], request: Request, config: ModelConfig) -> list[Wanted]:
    keys = sample_keys(prompts, request.num_samples, request.seed)
    wanted = []
    for index, prompt in enumerate(prompts):
        # The token that follows a full context can still be drawn.
        limit = min(len(prompt) + (request.max_new_tokens or config.block_size), config.block_size + 1)
        tokens = np.asarray(prompt, np.int32)
        wanted += [
            Wanted(index, number, tokens, keys[index, number], limit) for number in range(request.num_samples)
        ]
    return wanted


def _readings(network: Network, batch: Sequence[Wanted], known: dict[bytes, Reading]) -> dict[bytes, Reading]:
    """Each prompt's reading, made once, by its tokens; the batch before may have ended with the same prompt."""
    readings = {}
    for one in batch:
        name = one.prompt.tobytes()
        if name not in readings:
            readings[name] = known[name] if name in known else read_text(network, one.prompt)
    return readings


def _complete_batch(
    network: Network,
    batch: Sequence[Wanted],
    readings: dict[bytes, Reading],
    *,
    newline_id: int,
    request: Request,
) -> Iterator[Completion]:
    begun = time.perf_counter()
    rows, cache = _begin(network, batch, readings)
    while True:
        keys = fold_in(rows.keys, rows.length)
        token = draw(rows.logits, keys, temperature=request.temperature, top_k=request.top_k)
        ended = (token == newline_id) & (rows.previous == newline_id)
        rows = _with_drawn(rows, token)
        leaving = ended | (rows.length >= rows.limit)
        if leaving.any():
            seconds = time.perf_counter() - begun
            for place in leaving.nonzero()[0]:
                one = batch[rows.number[place]]
                tokens = tuple(rows.tokens[place, : rows.length[place]].tolist())
                log_prob, finished = float(rows.log_prob[place]), bool(ended[place])
                yield Completion(one.prompt_index, one.sample_index, tokens, log_prob, finished, seconds)
            if leaving.all():
                return
            rows = _without(rows, cache, leaving)
        rows = rows._replace(logits=step(network, cache, rows.previous, rows.length - 1))


def _begin(network: Network, batch: Sequence[Wanted], readings: dict[bytes, Reading]) -> tuple[Rows, Cache]:
    most = max(one.limit for one in batch)
    cache = empty_cache(network.config, len(batch), min(most, network.config.block_size))
    tokens = np.zeros((len(batch), most), np.int32)
    read = [readings[one.prompt.tobytes()] for one in batch]
    for place, (one, reading) in enumerate(zip(batch, read, strict=True)):
        tokens[place, : len(one.prompt)] = one.prompt
        cache.keys[:, place, :, : len(one.prompt)] = reading.keys
        cache.values[:, place, :, : len(one.prompt)] = reading.values
    rows = Rows(
        number=np.arange(len(batch)),
        tokens=tokens,
        length=np.array([len(one.prompt) for one in batch]),
        limit=np.array([one.limit for one in batch]),
        previous=np.full(len(batch), _NO_TOKEN),
        log_prob=np.zeros(len(batch)),
        keys=np.stack([one.key for one in batch]),
        logits=np.stack([reading.logits for reading in read]),
    )
    return rows, cache


def _with_drawn(rows: Rows, token: np.ndarray) -> Rows:
    """The rows with their next token; their logits are then out of date."""
    places = np.arange(len(token))
    rows.tokens[places, rows.length] = token
    peaks = rows.logits.max(-1)
    sums = np.log(np.exp(rows.logits - peaks[:, None]).sum(-1))
    log_prob = rows.logits[places, token] - peaks - sums
    return rows._replace(length=rows.length + 1, previous=token, log_prob=rows.log_prob + log_prob)


def _without(rows: Rows, cache: Cache, leaving: np.ndarray) -> Rows:
    """The rows that stay, in the first places: those behind move into the places that become free."""
    count = len(leaving) - int(leaving.sum())
    order = np.arange(count)
    holes = leaving[:count].nonzero()[0]
    order[holes] = count + (~leaving[count:]).nonzero()[0]
    for hole, place in zip(holes, order[holes], strict=True):
        length = rows.length[place]
        for part in cache:
            part[:, hole, :, :length] = part[:, place, :, :length]
    return Rows(*(part[order] for part in rows))
