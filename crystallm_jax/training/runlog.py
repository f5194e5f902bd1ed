"""What a run tells of itself while it runs: a line of `metrics.jsonl` a step, the progress bar, the trackers."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from crystallm_jax.model import ModelConfig, flops_per_token
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.metrics import MetricsLog, device_peak_flops

METRICS_FILE = "metrics.jsonl"
_SHOWN = ("loss", "lr", "tokens_per_s", "mfu")

logger = logging.getLogger(__name__)


class RunLog:
    """Where the figures of a run go; open it with `opened`."""

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, *, num_params: int, first_step: int
    ) -> None:
        self._config = config
        self._file = MetricsLog(Path(config.out_dir) / METRICS_FILE, first_step=first_step + 1)
        self._rate = _Rate(config, model_config, num_params, first_step)
        self._bar = tqdm(
            total=config.max_iters, initial=first_step, unit="step", disable=None, dynamic_ncols=True
        )

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, config: TrainConfig, model_config: ModelConfig, *, num_params: int, first_step: int
    ) -> Iterator[Self]:
        """A log that is closed behind the run, with this package's messages written above the progress bar."""
        log = cls(config, model_config, num_params=num_params, first_step=first_step)
        with log._bar, logging_redirect_tqdm():
            yield log

    def step(self, step: int, values: Mapping[str, float], losses: Mapping[str, float]) -> None:
        """Write and show a step.

        Args:
            step: its number.
            values: `loss`, `lr`, norms and whatever else is known of every step.
            losses: what an evaluation after this step found; empty without one.
        """
        line = {**values, **self._rate.measure(step), **losses}
        if losses or step % self._config.log_interval == 0:
            self._file.write(step=step, tokens=step * self._config.tokens_per_step, **line)
        self._bar.set_postfix_str(describe({key: line[key] for key in _SHOWN if key in line}))
        self._bar.update(step - self._bar.n)
        if losses:
            logger.info("step %d: loss %.4f, %s", step, values["loss"], describe(losses))

    def restart_clock(self) -> None:
        """Leave what was done since the last step (an evaluation, a checkpoint) out of the rates."""
        self._rate.restart()


class _Rate:
    """Tokens a second and model FLOP/s utilisation since the last measurement."""

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, num_params: int, first_step: int
    ) -> None:
        self._tokens_per_step = config.tokens_per_step
        self._flops_per_token = flops_per_token(model_config, num_params)
        peak = device_peak_flops(config.dtype)
        self._peak = None if peak is None else peak * jax.device_count()
        self._since = time.perf_counter()
        self._step = first_step

    def measure(self, step: int) -> dict[str, float]:
        """`tokens_per_s` and, where the device's peak is known, `mfu` (0 to 1)."""
        now = time.perf_counter()
        tokens_per_s = (step - self._step) * self._tokens_per_step / (now - self._since)
        self._since, self._step = now, step
        rates = {"tokens_per_s": round(tokens_per_s, 1)}
        if self._peak is not None:
            rates["mfu"] = round(tokens_per_s * self._flops_per_token / self._peak, 4)
        return rates

    def restart(self) -> None:
        """Begin anew after an evaluation or a checkpoint."""
        self._since = time.perf_counter()


def describe(values: Mapping[str, float]) -> str:
    """Figures for people: `loss 0.4321, tokens_per_s 12,345`."""
    return ", ".join(
        f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}" for name, value in values.items()
    )
