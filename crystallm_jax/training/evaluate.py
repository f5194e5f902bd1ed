"""Mean losses: of fixed batches in the middle of a run, and of all files of a set."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from crystallm_jax.data.rows import Rows, evaluation_batches, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.hosts.distributed import Share, sum_of_all
from crystallm_jax.models.model import Model
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.step import CompiledSteps, batch_loss


class Evaluator:
    """What an evaluation of a run reads: by the name of each loss, its rows and how many batches of them.

    Args:
        config: of the run.
        steps: its compiled steps.
        store: the training set.
        val_store: the validation set, if it is to be evaluated.
        share: of every batch, what this process reads.
    """

    def __init__(
        self,
        config: TrainConfig,
        steps: CompiledSteps,
        store: TokenStore,
        val_store: TokenStore | None,
        share: Share,
    ) -> None:
        self._config = config
        self._steps = steps
        self._share = share
        self._rows: dict[str, tuple[Rows, int]] = {
            name: (
                open_rows(source, block_size=config.block_size, windows=config.windows, seed=config.seed),
                count,
            )
            for name, source, count in (
                ("train_loss", store, config.eval_iters_train),
                ("val_loss", val_store, config.eval_iters_val),
            )
            if source is not None and count > 0
        }

    def losses(self, params: Any) -> dict[str, float]:
        """Mean losses of the targets in fixed batches of each set that is to be evaluated."""
        config = self._config
        found = {}
        for name, (rows, count) in self._rows.items():
            losses, counted = [], []
            for batch in evaluation_batches(
                rows,
                batch_size=config.batch_size,
                count=count,
                seed=config.seed,
                host=self._share.host,
                hosts=self._share.hosts,
            ):
                placed = jax.tree.map(self._placed, batch)
                losses.append(self._steps.evaluate(params, placed))
                counted.append(batch.counted)
            found[name] = float(np.average(jax.device_get(losses), weights=sum_of_all(counted)))
        return found

    def _placed(self, leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self._steps.batch, leaf)


class FilesLoss(NamedTuple):
    """The mean loss over the tokens of files, in nats, and how many tokens were predicted."""

    loss: float
    targets: int


def loss_of_files(
    weights: Model, store: TokenStore, *, batch_size: int = 4, first: int | None = None
) -> FilesLoss:
    """The mean loss of the files of a set, each read alone from position 0, as sampling reads them.

    A file that is longer than the context counts with its beginning. The arithmetic is float32.

    Args:
        weights: the model.
        store: the set.
        batch_size: rows of files side by side that are read at once.
        first: how many files to read, from the beginning; None reads all.
    """
    config = replace(weights.config, dtype="float32")
    records = None if first is None else np.arange(min(first, len(store)))
    rows = open_rows(store, block_size=config.block_size, windows="packed", seed=0, records=records)
    evaluate = jax.jit(partial(batch_loss, config))
    params = jax.device_put(weights.params)
    losses, counted = [], []
    count = -(-len(rows) // batch_size)
    for batch in evaluation_batches(rows, batch_size=batch_size, count=count, seed=0):
        losses.append(evaluate(params, batch))
        counted.append(batch.counted)
    return FilesLoss(float(np.average(jax.device_get(losses), weights=counted)), sum(counted))
