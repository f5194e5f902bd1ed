"""Samples in the middle of a training run: how many of them are valid, the number that the model exists for."""

import logging
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from crystallm_jax.cif import CIFTokenizer, prompt_from_cif
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation import ValidatorPool
from crystallm_jax.model import ModelConfig
from crystallm_jax.model.stacking import unstacked
from crystallm_jax.processes import usable_cores
from crystallm_jax.sampling.generate import default_batch_size, generate
from crystallm_jax.sampling.requests import GenerationRequest
from crystallm_jax.train_run.train_config import TrainConfig

_HELD_OUT = "val"
_TIME_LIMIT = 30.0  # seconds a text
# Validation needs a core each; the feed and the device want theirs back soon.
_MOST_WORKERS = 8

logger = logging.getLogger(__name__)


class ValidityProbe:
    """Samples crystals for compositions of the validation set and judges them; a context manager.

    The compositions and the seed are the same at every step, so that its figures make a curve: one sample for each
    of `sample_count` records drawn once (of the training set where there is no validation set, which is said).
    Temperature 1.0 and top-k 10, as `crystallm sample` has them.

    Prefill and decode are compiled once a run, for each cache size that the samples grow into. Judging is done by
    worker processes, which start with the first sample and stay; this one loads no pymatgen.

    Args:
        config: of the run.

    Raises:
        CrystallmError: no record whose composition fits the context.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._tokenizer = CIFTokenizer()
        self._prompts = _prompts(config, self._tokenizer)
        count = len(self._prompts)
        self._request = GenerationRequest(seed=config.seed, batch_size=min(count, default_batch_size()))
        self._pool = ValidatorPool(min(usable_cores(), count, _MOST_WORKERS), _TIME_LIMIT)
        self._gather: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the worker processes."""
        self._pool.__exit__(kind, error, trace)

    def __call__(
        self,
        step: int,  # noqa: ARG002  every probe is told
        params: Any,
        model_config: ModelConfig,
    ) -> dict[str, float]:
        """Sample and judge; every process of a run must call it, the first samples.

        Args:
            step: of the run.
            params: as they are sharded, in the layout that is trained.
            model_config: the shape that is trained.

        Returns:
            `valid_share` and `finished_share` (texts that came to their end) of all `sampled`, whatever became of
            them; empty in all processes but the first.
        """
        params = self._on_one_device(params)
        if jax.process_index() != 0:
            return {}
        # Dropout is for training; so are the layouts and backends that make it fast.
        config = replace(
            model_config,
            dropout=0.0,
            attention_dropout=None,
            attention="auto",
            layers="unrolled",
            remat="none",
        )
        newline_id = self._tokenizer.token_to_id["\n"]
        verdicts, finished = [], 0
        batches = generate(
            config,
            params,
            self._prompts,
            newline_id=newline_id,
            request=self._request,
            devices=jax.local_devices()[:1],
        )
        for batch in batches:
            finished += sum(completion.finished for completion in batch)
            # Judged while the device goes on with the next batch.
            verdicts += [self._pool.submit(self._tokenizer.decode(item.token_ids)) for item in batch]
        valid = sum(verdict.result().valid for verdict in verdicts)
        count = len(self._prompts)
        return {"valid_share": valid / count, "finished_share": finished / count, "sampled": count}

    def _on_one_device(self, params: Any) -> dict[str, Any]:
        """The parameters a layer, whole, on this process's first device: through a copy on every device of the mesh."""
        if self._gather is None:
            mesh = jax.tree.leaves(params)[0].sharding.mesh
            self._gather = jax.jit(unstacked, out_shardings=NamedSharding(mesh, PartitionSpec()))
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), self._gather(params))


def _prompts(config: TrainConfig, tokenizer: CIFTokenizer) -> list[np.ndarray]:
    """Token ids of the compositions of records, drawn by the run's seed; repeated where there are too few records."""
    store = TokenStore.open(config.dataset)
    if (store.folder / f"{_HELD_OUT}.bin").is_file():
        store = TokenStore.open(config.dataset, _HELD_OUT)
    else:
        logger.warning("%s has no validation set: compositions of its training set are sampled", store.folder)
    order = np.random.default_rng(config.seed).permutation(len(store))[: 4 * config.sample_count]
    prompts = [tokenizer.encode_cif(prompt_from_cif(store.text(int(i)))) for i in order]
    fitting = [prompt for prompt in prompts if len(prompt) <= config.block_size]
    if not fitting:
        raise SamplingError(
            f"sample_interval={config.sample_interval}: no composition in {store.folder} fits the context of"
            f" {config.block_size} tokens; set sample_interval=0 or a greater block_size"
        )
    return [fitting[i % len(fitting)] for i in range(config.sample_count)]
