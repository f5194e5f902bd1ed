"""Steps whose loss or gradient is not a finite number: they changed nothing, and what they read is written out."""

import json
import logging
import math
from pathlib import Path

import jax
import numpy as np

from crystallm_jax.data.feed import Feed
from crystallm_jax.errors import DataError, ModelError
from crystallm_jax.files import new_file
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.step import StepMetrics

# Steps of which a line tells and whose records are written out; those after them are only counted.
_TOLD = 20
# In a row: more data will not help a run that comes to this.
_MOST_IN_A_ROW = 100

logger = logging.getLogger(__name__)


class NonFiniteSteps:
    """Looks at each step's metrics, and stops the run or lets it go on, as `non_finite` says.

    Args:
        config: of the run.
        feed: says which records a step has read.
    """

    def __init__(self, config: TrainConfig, feed: Feed) -> None:
        self._config = config
        self._feed = feed
        self._count = 0
        self._in_a_row = 0

    def check(self, step: int, metrics: StepMetrics, newest: int | None) -> None:
        """Judge a step.

        Args:
            step: its number.
            metrics: of it, on the host.
            newest: the step of the newest checkpoint.

        Raises:
            ModelError: the run stops here; nothing of this step is saved.
        """
        go_on = "begin anew" if newest is None else f"go on from step {newest} with init_from=resume"
        if not math.isfinite(metrics.param_norm):
            raise ModelError(
                f"step {step}: the norm of the parameters is {metrics.param_norm} (the loss before it was"
                f" {metrics.loss}); lower learning_rate and {go_on}"
            )
        if math.isfinite(metrics.grad_norm) and np.isfinite(metrics.micro_losses).all():
            self._in_a_row = 0
            return
        self._count += 1
        self._in_a_row += 1
        what = f"step {step}: the loss is {metrics.loss}, the gradient's norm {metrics.grad_norm}"
        if self._config.non_finite == "stop":
            records = self._write_records(step, metrics)
            raise ModelError(
                f"{what}: {records}; look at them, lower learning_rate or set non_finite=skip, and {go_on}"
            )
        if self._in_a_row >= _MOST_IN_A_ROW:
            records = self._write_records(step, metrics)
            raise ModelError(
                f"{what}, as of the {_MOST_IN_A_ROW - 1} steps before it, which were skipped: {records}; lower"
                f" learning_rate and {go_on}"
            )
        if self._count <= _TOLD:
            last = "; later ones are only counted" if self._count == _TOLD else ""
            logger.warning("%s: skipped; %s%s", what, self._write_records(step, metrics), last)

    def _write_records(self, step: int, metrics: StepMetrics) -> str:
        """Write what a step has read, by one process for all, and say where it stands, or why it does not."""
        path = Path(self._config.out_dir) / f"non_finite_step_{step}.json"
        if jax.process_index() == 0:
            try:
                _write(path, step, metrics, ids=self._feed.record_ids(step))
            except DataError as error:
                return f"its records cannot be named ({error})"
            except OSError as error:
                return f"its records could not be written to {path} ({error.strerror})"
        return f"its records are in {path}"


def _write(path: Path, step: int, metrics: StepMetrics, *, ids: list[list[list[str]]]) -> None:
    values = {
        "step": step,
        "loss": _number(metrics.loss),
        "grad_norm": _number(metrics.grad_norm),
        # Of a row, the record that it begins with and those that follow in it.
        "micro_batches": [
            {"loss": _number(loss), "rows": rows}
            for loss, rows in zip(metrics.micro_losses, ids, strict=True)
        ],
    }
    with new_file(path) as partial:
        partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


def _number(value: jax.Array) -> float | str:
    """A number that JSON knows, or its name."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
