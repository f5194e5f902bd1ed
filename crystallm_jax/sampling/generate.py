"""From prompts to completions: rows in batches, each batch prefilled and decoded bucket by bucket."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.errors import SamplingError
from crystallm_jax.model import ModelConfig
from crystallm_jax.model.config import DType
from crystallm_jax.sampling.decode import DecodeState, bucket_size, decode, grow, prefill
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.slide import slide

# What the published generator allows when its window slides (`max_new_tokens` of its generate_cifs.py).
SLIDE_NEW_TOKENS = 3000
DEFAULT_BATCH_SIZE = 64

Constrain = Literal["syntax", "composition", "symmetry"]


class Completion(NamedTuple):
    """One completed prompt.

    Attributes:
        prompt_index: which prompt, in the order given.
        sample_index: which of its samples.
        token_ids: prompt and generated tokens.
        log_prob: log-probability in nats of the generated tokens under the model (temperature 1, all tokens).
        finished: whether the text came to its end (two newlines) before a limit.
        seconds: from its beginning in a batch to its end.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    log_prob: float
    finished: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """What to sample, apart from the prompts.

    Attributes:
        method: how tokens are drawn.
        num_samples: samples a prompt.
        max_new_tokens: most tokens to add to a prompt; None goes on to the context's end.
        seed: of all randomness.
        batch_size: rows decoded together; it changes no sample.
        overflow: `stop` ends a sample unfinished where the context ends; `slide` goes on as the published
            generator does, uncached and slow.
        constrain: what every sample is held to: `syntax` of the dialect, the prompt's `composition` too, or the
            stated space group's `symmetry` as well; None holds it to nothing.
        jump_from: runs of so many forced tokens or more are read at once instead of one a step; None reads each by
            itself. It changes no sample but for rounding.
        cache_dtype: of the keys and values kept; None takes the model's. `bfloat16` halves the memory and what a
            step reads.
    """

    method: SamplingMethod = field(default_factory=SamplingMethod)
    num_samples: int = 1
    max_new_tokens: int | None = None
    seed: int = 0
    batch_size: int = DEFAULT_BATCH_SIZE
    overflow: Literal["stop", "slide"] = "stop"
    constrain: Constrain | None = None
    jump_from: int | None = 16
    cache_dtype: DType | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise SamplingError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise SamplingError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise SamplingError(f"seed={self.seed}: must be at least 0 and below 2**32")
        if self.overflow not in ("stop", "slide"):
            raise SamplingError(f"overflow={self.overflow!r}: must be 'stop' or 'slide'")


class _Row(NamedTuple):
    prompt_index: int
    sample_index: int
    prompt: np.ndarray
    key: np.ndarray


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[np.ndarray],
    *,
    newline_id: int,
    request: GenerationRequest,
) -> Iterator[list[Completion]]:
    """Complete prompts of token ids (int [T] each), yielding batches of completions as they are done.

    A sample depends on the seed, its prompt's tokens, how often that prompt came before in the list, and its sample
    index: never on the batch size or on the other prompts.

    Raises:
        SamplingError: a prompt is empty or leaves no room in the context.
    """
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.block_size:
            raise SamplingError(
                f"prompt {index} has {len(prompt)} tokens; the model's context takes 1 to {config.block_size}"
            )
    rows = _rows(prompts, request)
    # Rows of like length share a batch, so that short prompts are not padded to long ones.
    rows.sort(key=lambda row: len(row.prompt))
    batch_size = min(request.batch_size, len(rows)) if rows else 1
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        state = _complete(config, params, batch, batch_size, newline_id=newline_id, request=request)
        yield _completions(batch, state)


def _rows(prompts: Sequence[np.ndarray], request: GenerationRequest) -> list[_Row]:
    root = jax.random.key(request.seed)
    seen: dict[bytes, int] = {}
    identities = []
    for index, prompt in enumerate(prompts):
        content = np.asarray(prompt, "<u2").tobytes()
        occurrence = seen[content] = seen.get(content, -1) + 1
        identities += [
            (index, sample, zlib.crc32(content), occurrence) for sample in range(request.num_samples)
        ]
    if not identities:
        return []

    def row_key(content: jax.Array, occurrence: jax.Array, sample: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, content), occurrence)
        return jax.random.fold_in(key, sample)

    columns = np.array(identities, np.uint32)
    keys = jax.vmap(row_key)(*jnp.asarray(columns[:, [2, 3, 1]].T))
    # On the host: rows of a device array, taken one by one, cost a quarter of a millisecond each.
    on_host = np.asarray(jax.random.key_data(keys))
    return [_Row(i, s, np.asarray(prompts[i]), on_host[n]) for n, (i, s, _, _) in enumerate(identities)]


def _complete(
    config: ModelConfig,
    params: dict,
    batch: Sequence[_Row],
    batch_size: int,
    *,
    newline_id: int,
    request: GenerationRequest,
) -> DecodeState:
    """Decode one batch; a last, smaller one is filled with rows that have nothing to do, to keep its shape."""
    filled = [*batch, *[batch[0]] * (batch_size - len(batch))]
    lengths = np.array([len(row.prompt) for row in filled], np.int32)
    wanted = request.max_new_tokens
    if wanted is None:
        wanted = SLIDE_NEW_TOKENS if request.overflow == "slide" else config.block_size
    # The token that follows a full context can still be drawn.
    in_context = np.minimum(lengths + wanted, config.block_size + 1)
    in_context[len(batch) :] = 0
    width = bucket_size(int(lengths.max()), config.block_size)
    prompts = np.zeros((batch_size, width), np.int32)
    for place, row in zip(prompts, filled, strict=True):
        place[: len(row.prompt)] = row.prompt
    state = prefill(
        config,
        request.method,
        newline_id,
        bucket_size(width + 1, config.block_size),
        params=params,
        prompts=prompts,
        lengths=lengths,
        limit=in_context,
        keys=jax.random.wrap_key_data(jnp.asarray(np.stack([row.key for row in filled]))),
    )
    state = decode(config, request.method, newline_id, params=params, state=state)
    while bool(state.active.any()):
        state = grow(state, bucket_size(state.cache.size + 1, config.block_size))
        state = decode(config, request.method, newline_id, params=params, state=state)
    if request.overflow == "slide":
        limit = np.where(in_context > 0, lengths + wanted, 0)
        room = [(0, 0), (0, max(0, int(limit.max()) - state.tokens.shape[1]))]
        state = replace(state, limit=jnp.asarray(limit), tokens=jnp.pad(state.tokens, room))
        state = slide(config, request.method, newline_id, params=params, state=state)
    return state


def _completions(batch: Sequence[_Row], state: DecodeState) -> list[Completion]:
    tokens, length, log_prob, finished = jax.device_get(
        (state.tokens, state.length, state.log_prob, state.finished)
    )
    return [
        Completion(
            prompt_index=row.prompt_index,
            sample_index=row.sample_index,
            token_ids=tuple(tokens[n, : length[n]].tolist()),
            log_prob=float(log_prob[n]),
            finished=bool(finished[n]),
        )
        for n, row in enumerate(batch)
    ]
