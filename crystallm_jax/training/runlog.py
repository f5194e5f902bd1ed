"""What a run tells of itself while it runs: a line of `metrics.jsonl` a step, the progress bar, the trackers."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from crystallm_jax.model import ModelConfig, flops_per_token
from crystallm_jax.train_run.metrics import METRICS_FILE, MetricsLog
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.chips import device_peak_flops
from crystallm_jax.training.memory import memory_use
from crystallm_jax.training.profiling import PROFILE_FOLDER, Profile
from crystallm_jax.training.trackers import Trackers

_SHOWN = ("loss", "lr", "tokens_per_s", "mfu")

logger = logging.getLogger(__name__)


class _Outputs(NamedTuple):
    """Where the figures of the process that writes go."""

    file: MetricsLog
    trackers: Trackers
    profile: Profile
    rate: "_Rate"
    bar: tqdm


class RunLog:
    """Where the figures of a run go; open it with `opened`.

    A line of `metrics.jsonl` has, besides what the step reports:

    - `step`, and `tokens` that all steps so far read;
    - `elapsed_s`: seconds that the run took up to here, all its sessions together, without steps that were redone;
    - `step_time_s`, `tokens_per_s`: of the last step, evaluations and checkpoints left out (the first of a session
      includes compilation; null where it cannot be told). Every position that is read counts as a token, the padding
      of packed rows too: it costs the same;
    - `mfu`: the model's FLOP/s over the devices' 16-bit peak, 0 to 1, whatever the arithmetic is, so that figures
      compare: float32 shows as slow as it is. Where the peak is known alone;
    - `data_wait_s`, and `data_wait_share` of the step's time: spent waiting for the feed;
    - `memory_bytes`, `memory_peak_bytes`: of the fullest device (on a CPU of the process);
    - after an evaluation `train_loss`, `val_loss`; after a sampling `valid_share`, `finished_share`, `sampled`.
    """

    def __init__(self, config: TrainConfig, outputs: _Outputs | None) -> None:
        self._config = config
        self._outputs = outputs
        self._opened = time.perf_counter()
        self._elapsed_before = 0.0 if outputs is None else float(outputs.file.last.get("elapsed_s") or 0.0)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        config: TrainConfig,
        model_config: ModelConfig,
        *,
        num_params: int,
        first_step: int,
        writes: bool = True,
    ) -> Iterator[Self]:
        """A log that is closed behind the run, with this package's messages written above the progress bar.

        Args:
            config: of the run.
            model_config: the shape that it trains.
            num_params: of that.
            first_step: steps taken before.
            writes: whether this is the process that writes; in the others the log is silent.

        Raises:
            CrystallmError: a tracker that is asked for is missing, or the folder cannot be written.
        """
        if not writes:
            yield cls(config, None)
            return
        out_dir = Path(config.out_dir)
        with contextlib.ExitStack() as stack:
            trackers = stack.enter_context(Trackers(config, first_step=first_step + 1))
            outputs = _Outputs(
                MetricsLog(out_dir / METRICS_FILE, first_step=first_step + 1),
                trackers,
                stack.enter_context(
                    Profile(out_dir / PROFILE_FOLDER, first_step=first_step, steps=config.profile_steps)
                ),
                _Rate(config, model_config, num_params, first_step),
                tqdm(
                    total=config.max_iters, initial=first_step, unit="step", disable=None, dynamic_ncols=True
                ),
            )
            stack.enter_context(outputs.bar)
            package = logging.getLogger("crystallm_jax")
            talking = [source for source in (logging.getLogger(), package) if source.handlers]
            stack.enter_context(logging_redirect_tqdm(talking))
            yield cls(config, outputs)

    def step(self, step: int, values: Mapping[str, float], losses: Mapping[str, float]) -> None:
        """Write and show a step.

        Args:
            step: its number.
            values: `loss`, `lr`, norms and whatever else is known of every step.
            losses: what an evaluation or a sampling after this step found; empty without one.
        """
        if self._outputs is None:
            return
        outputs = self._outputs
        line = {**values, **outputs.rate.measure(step, values.get("data_wait_s", 0.0)), **losses}
        if losses or step % self._config.log_interval == 0:
            line |= memory_use()
            line["elapsed_s"] = round(self._elapsed_before + time.perf_counter() - self._opened, 3)
            outputs.file.write(step=step, tokens=step * self._config.tokens_per_step, **line)
            outputs.trackers.write(step, line)
        outputs.bar.set_postfix_str(describe({key: line[key] for key in _SHOWN if key in line}))
        outputs.bar.update(step - outputs.bar.n)
        if losses:
            logger.info("step %d: loss %.4f, %s", step, values["loss"], describe(losses))
        if outputs.profile.reported(step):
            outputs.rate.lose()

    def stop_clock(self) -> None:
        """Leave what is done from here on (an evaluation, a sampling, a checkpoint) out of the rates."""
        if self._outputs is not None:
            self._outputs.rate.stop()

    def restart_clock(self) -> None:
        """The next step begins."""
        if self._outputs is not None:
            self._outputs.rate.restart()


class _Rate:
    """Tokens a second and model FLOP/s utilisation since the last measurement."""

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, num_params: int, first_step: int
    ) -> None:
        self._tokens_per_step = config.tokens_per_step
        self._flops_per_token = flops_per_token(model_config, num_params)
        peak = device_peak_flops(config.dtype)
        self._peak = None if peak is None else peak * jax.device_count()
        self._step = first_step
        self._since = time.perf_counter()
        self._stopped: float | None = None

    def measure(self, step: int, data_wait_s: float) -> dict[str, float]:
        """The rates since the last call, up to where the clock was stopped; NaN where they cannot be told."""
        now = time.perf_counter() if self._stopped is None else self._stopped
        seconds, steps = now - self._since, step - self._step
        self._since, self._step = now, step
        tokens_per_s = steps * self._tokens_per_step / seconds
        rates = {
            "step_time_s": round(seconds / steps, 6),
            "tokens_per_s": round(tokens_per_s, 1),
            "data_wait_share": round(data_wait_s / seconds, 4),
        }
        if self._peak is not None:
            rates["mfu"] = round(tokens_per_s * self._flops_per_token / self._peak, 4)
        return rates

    def stop(self) -> None:
        """The step is done; what follows is none of it."""
        self._stopped = time.perf_counter()

    def restart(self) -> None:
        """The next step begins."""
        self._since, self._stopped = time.perf_counter(), None

    def lose(self) -> None:
        """Give up on the step that ran meanwhile: how much of the time was its own cannot be told."""
        self._since = math.nan


def describe(values: Mapping[str, float]) -> str:
    """Figures for people: `loss 0.4321, tokens_per_s 12,345`."""
    return ", ".join(
        f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}" for name, value in values.items()
    )
