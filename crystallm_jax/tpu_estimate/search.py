"""The fastest of several meshes, by prediction."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from crystallm_jax.errors import ConfigError
from crystallm_jax.tpu_estimate.compile_ahead import MemoryExceededError, Report, compile_training
from crystallm_jax.tpu_estimate.topology import Slice
from crystallm_jax.train_run.train_config import TrainConfig

_TENSOR_SIZES = (1, 2, 4)

logger = logging.getLogger(__name__)


class MeshSizes(NamedTuple):
    """Sizes of a mesh's axes."""

    data: int
    fsdp: int
    tensor: int


def candidate_meshes(devices: int, *, n_head: int, n_embd: int, batch_size: int) -> Iterator[MeshSizes]:
    """Meshes worth trying: data alone, parameters split over all devices or over some, and heads besides.

    Those over which the batch, the heads or the width cannot be split evenly are left out.
    """
    for tensor in _TENSOR_SIZES:
        if devices % tensor or n_head % tensor:
            continue
        rest = devices // tensor
        middle = next(size for size in range(int(rest**0.5), 0, -1) if rest % size == 0)
        # The greater of two factors, so that 8 devices give 2 × 4.
        for fsdp in sorted({1, rest // middle, rest}):
            if batch_size % rest == 0 and n_embd % fsdp == 0:
                yield MeshSizes(rest // fsdp, fsdp, tensor)


def expected_seconds(report: Report) -> float:
    """The step time that meshes are compared by: halfway between the two of the prediction."""
    return (report.prediction.overlapped + report.prediction.serial) / 2


def search_meshes(config: TrainConfig, vocab_size: int, placed: Slice) -> list[Report]:
    """Compile the training step on every candidate and return them, the fastest first.

    Raises:
        ConfigError: no mesh divides the batch.
        MemoryExceededError: the step fits on none.
    """
    reports: list[Report] = []
    last: MemoryExceededError | None = None
    meshes = list(
        candidate_meshes(
            len(placed.devices), n_head=config.n_head, n_embd=config.n_embd, batch_size=config.batch_size
        )
    )
    if not meshes:
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide over the {len(placed.devices)} chips of {placed.name}:"
            " choose a multiple of them"
        )
    for number, mesh in enumerate(meshes, 1):
        sizes = " × ".join(f"{name} {size}" for name, size in mesh._asdict().items())
        tried = replace(config, data_parallel=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor)
        try:
            report = compile_training(tried, vocab_size, placed)
        except MemoryExceededError as error:
            logger.info("%d of %d, %s: %s", number, len(meshes), sizes, error)
            last = error
            continue
        logger.info(
            "%d of %d, %s: %.4g to %.4g s a step predicted, %.1f GiB",
            *(number, len(meshes), sizes),
            *(report.prediction.overlapped, report.prediction.serial, report.memory.peak / 1024**3),
        )
        reports.append(report)
    if not reports and last is not None:
        raise last
    return sorted(reports, key=expected_seconds)
