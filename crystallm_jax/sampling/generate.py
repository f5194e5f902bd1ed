"""From prompts to completions: what is asked for goes through the engine, what ended comes out."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from crystallm_jax.errors import SamplingError
from crystallm_jax.model import ModelConfig
from crystallm_jax.model.inference import prepared_weights
from crystallm_jax.sampling.constrain import Automaton
from crystallm_jax.sampling.decode import Rules
from crystallm_jax.sampling.devices import placements
from crystallm_jax.sampling.engine import Ended, Engine, EngineShape, Row
from crystallm_jax.sampling.keys import PromptKeys
from crystallm_jax.sampling.requests import Completion, EverySample, GenerationRequest, Orders, Wanted
from crystallm_jax.sampling.rounds import all_rounds
from crystallm_jax.sampling.shapes import padded_count
from crystallm_jax.sampling.slide import slide

# What the published generator allows when its window slides (`max_new_tokens` of its generate_cifs.py).
SLIDE_NEW_TOKENS = 3000


def generate(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[np.ndarray],
    *,
    newline_id: int,
    request: GenerationRequest,
    orders: Orders | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[list[Completion]]:
    """Complete prompts of token ids (int [T] each), yielding completions as they are done.

    A sample depends on the seed, its prompt's tokens, how often that prompt came before in the list, and its sample
    index: never on the batch size, on the other prompts, on devices, or on the order in which samples are made.

    Args:
        config: the model's shape, unrolled.
        params: of the model.
        prompts: all that `orders` may name.
        newline_id: the token of which two in a row end a sample.
        request: how to sample.
        orders: which samples to make; None makes `num_samples` of each prompt.
        devices: where to; None takes all of this process.

    Raises:
        SamplingError: a prompt is empty, leaves no room in the context or cannot be constrained, or `tensor` does not
            divide the devices or the heads.
    """
    rules = _rules(request, newline_id)
    _check(config, prompts, request, rules)
    orders = orders or EverySample([request.num_samples] * len(prompts))
    places = placements(config, request.tensor, devices)
    first = _first(orders, request.batch_size or default_batch_size() * len(places))
    # Replicas and places that would stay empty are left out.
    places = places[: max(len(first), 1)]
    share = -(-max(len(first), 1) // len(places))
    most = default_batch_size() if request.batch_size is None else -(-request.batch_size // len(places))
    rows = min(most, padded_count(share))
    longest = _longest(config, prompts, request)
    shape = EngineShape(
        config, rules, rows, page_size(places[0].platform), request.cache_dtype or config.dtype, longest
    )
    weights = prepared_weights(config, params)
    engines = [Engine(shape, weights, place) for place in places]
    keys = PromptKeys(prompts, request.seed)

    def rows_of(engine: Engine, wanted: Sequence[Wanted]) -> list[Row]:
        whose = keys.of(wanted, engine.placement.whole)
        return _rows(wanted, whose, config=config, prompts=prompts, request=request)

    beyond: list[Ended] = []
    for ended in all_rounds(engines, orders, first=first, rows_of=rows_of):
        beyond += [one for one in ended if _goes_on(one, config, request)]
        within = [one for one in ended if not _goes_on(one, config, request)]
        if within:
            yield [_completion(one) for one in within]
    for begin in range(0, len(beyond), rows):
        part = beyond[begin : begin + rows]
        limits = [len(one.row.prompt) + (request.max_new_tokens or SLIDE_NEW_TOKENS) for one in part]
        yield [_completion(one) for one in slide(config, rules, part, params=params, limits=limits)]


def _check(
    config: ModelConfig, prompts: Sequence[np.ndarray], request: GenerationRequest, rules: Rules
) -> None:
    """Refuse prompts that cannot be honoured: now, not once the samples of those before them are made."""
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.block_size:
            raise SamplingError(
                f"prompt {index} has {len(prompt)} tokens; the model's context takes 1 to {config.block_size}"
            )
        if rules.automaton is not None:
            if excluded := set(request.method.excluded).intersection(prompt.tolist()):
                raise SamplingError(
                    f"prompt {index} holds the token {min(excluded)}, which is never to be drawn: where samples are"
                    " constrained to their prompt, leave out one of them"
                )
            rules.automaton.plan(prompt, limit=_limit(prompt, request.max_new_tokens, config))


def page_size(platform: str) -> int:
    """Positions of a page of the cache, and steps between two looks of the host: in half of them a place is empty.

    An accelerator's steps are short beside what the host does between. Not measured there yet.
    """
    return 16 if platform == "cpu" else 32


def default_batch_size() -> int:
    """Rows decoded together unless told: enough to fill the platform's arithmetic."""
    return 64 if jax.default_backend() == "cpu" else 512


def _longest(config: ModelConfig, prompts: Sequence[np.ndarray], request: GenerationRequest) -> int:
    """Tokens of the longest text to come, in a few sizes, for each is another program."""
    tokens = max(map(len, prompts), default=0) + (request.max_new_tokens or config.block_size)
    return min(max(padded_count(tokens), 256), config.block_size)


def _first(orders: Orders, most: int) -> Sequence[Wanted]:
    """What there is to begin with, at most so many; waits where nothing is ready yet."""
    wanted: list[Wanted] = []
    while len(wanted) < most:
        more = orders.take(most - len(wanted))
        if not more and (wanted or not orders.wait()):
            break
        wanted += more
    return wanted


def _rules(request: GenerationRequest, newline_id: int) -> Rules:
    if request.constrain is None:
        return Rules(request.method, newline_id)
    if request.overflow == "slide":
        raise SamplingError("constrain does not go with overflow=slide: what is forced must fit the context")
    return Rules(request.method, newline_id, Automaton(request.constrain))


def _rows(
    wanted: Sequence[Wanted],
    keys: np.ndarray,
    *,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    request: GenerationRequest,
) -> list[Row]:
    rows = []
    for one, key in zip(wanted, keys, strict=True):
        prompt = np.asarray(prompts[one.prompt_index], np.int32)
        limit = _limit(prompt, one.max_new_tokens or request.max_new_tokens, config)
        rows.append(Row((one.prompt_index, one.sample_index), prompt, key, limit))
    return rows


def _limit(prompt: np.ndarray, max_new_tokens: int | None, config: ModelConfig) -> int:
    """Tokens that a row of the prompt may have in all: the one that follows a full context can still be drawn."""
    return min(len(prompt) + (max_new_tokens or config.block_size), config.block_size + 1)


def _goes_on(ended: Ended, config: ModelConfig, request: GenerationRequest) -> bool:
    """Whether a row goes on beyond the context."""
    return request.overflow == "slide" and not ended.finished and len(ended.tokens) > config.block_size


def _completion(ended: Ended) -> Completion:
    return Completion(
        *ended.row.name,
        token_ids=tuple(ended.tokens.tolist()),
        log_prob=ended.log_prob,
        finished=ended.finished,
        seconds=ended.seconds,
        returns=ended.history.returns,
        unplaced=ended.unplaced,
    )
