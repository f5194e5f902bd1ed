"""The training loop: build, restore, step, log one step late, evaluate, save, stop when asked."""

import contextlib
import dataclasses
import logging
import math
import platform
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from crystallm_jax.config import to_yaml
from crystallm_jax.data.feed import Feed, Rows, evaluation_batches, open_feed, open_rows
from crystallm_jax.data.packing import Batch
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ConfigError, CrystallmError, ModelError
from crystallm_jax.model import ModelConfig, count_params, flops_per_token
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.load import CHECKPOINTS_FOLDER, CONFIG_FILE, crop_block_size, load_weights
from crystallm_jax.training.metrics import MetricsLog, device_peak_flops
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import CompiledSteps, StepMetrics, TrainState, compile_steps, initial_state

METRICS_FILE = "metrics.jsonl"
_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")

logger = logging.getLogger(__name__)


class TrainingStoppedError(CrystallmError):
    """A signal ended the run; its last state is saved. The exit code is the shell's for that signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class RunResult(NamedTuple):
    """Where a finished run stands; a loss that was not computed is None."""

    step: int
    loss: float | None
    val_loss: float | None


def run(config: TrainConfig) -> RunResult:
    """Train as configured, from scratch, from other weights, or from where `out_dir` stands.

    Raises:
        CrystallmError: anything in the configuration, the data or the checkpoints that cannot be used.
        TrainingStoppedError: SIGTERM or Ctrl-C, after the state was saved.
    """
    if not config.dataset:
        raise ConfigError("dataset is not set: give dataset=DIR, a folder made by `crystallm prepare`")
    store = TokenStore.open(config.dataset)
    val_store = TokenStore.open(config.dataset, "val") if config.validate else None
    model_config = config.model_config(store.header.vocab_size)
    mesh = make_mesh(config.data_parallel, config.fsdp)
    steps = compile_steps(config, model_config, mesh)
    out_dir = _made(config.out_dir)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(out_dir / CHECKPOINTS_FOLDER, config.keep_checkpoints))
        feed = stack.enter_context(
            contextlib.closing(
                open_feed(
                    store,
                    block_size=config.block_size,
                    windows=config.windows,
                    batch_size=config.batch_size,
                    micro_batches=config.gradient_accumulation_steps,
                    seed=config.seed,
                    underrep_p=config.underrep_p,
                    host=jax.process_index(),
                    hosts=jax.process_count(),
                )
            )
        )
        state, first_step = _start(config, model_config, steps, checkpoints, feed)
        stop = stack.enter_context(_stop_signals())
        _write_config(out_dir, config)
        evaluated = _evaluated_rows(config, store, val_store)
        trainer = _Trainer(config, model_config, steps, checkpoints, feed, evaluated, stop)
        logger.info(
            "%s: %.2f M parameters, %d training records, %d devices, from step %d of %d",
            out_dir,
            count_params(steps.abstract.params) / 1e6,
            len(store),
            mesh.size,
            first_step,
            config.max_iters,
        )
        return trainer.run(state, first_step)


def _evaluated_rows(
    config: TrainConfig, store: TokenStore, val_store: TokenStore | None
) -> dict[str, tuple[Rows, int]]:
    """By the name of each loss, the rows that it is of and how many batches of them."""
    return {
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


def _made(out_dir: str) -> Path:
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out_dir={out_dir}: cannot be made: {error.strerror}") from None
    return Path(out_dir)


def _start(
    config: TrainConfig,
    model_config: ModelConfig,
    steps: CompiledSteps,
    checkpoints: Checkpoints,
    feed: Feed,
) -> tuple[TrainState, int]:
    """The state to begin with and its step; the feed is set to the same place."""
    if config.init_from == "resume":
        saved = checkpoints.describe()
        _check_shape({**dataclasses.asdict(model_config)}, saved["model"], str(checkpoints.folder))
        restored = checkpoints.restore(steps.abstract)
        feed.set_state(restored.data_state)
        return restored.state, restored.step
    newest = checkpoints.latest_step()
    if newest is not None:
        raise ConfigError(
            f"{config.out_dir} already holds a run at step {newest}: use init_from=resume or another out_dir"
        )
    if config.init_from == "scratch":
        return initial_state(config, model_config, steps), 0
    weights = crop_block_size(load_weights(config.init_from), config.block_size, place=config.init_from)
    _check_shape(dataclasses.asdict(model_config), dataclasses.asdict(weights.config), config.init_from)
    return initial_state(config, model_config, steps, weights.params), 0


def _check_shape(wanted: dict[str, Any], found: dict[str, Any], place: str) -> None:
    for key in _SHAPE_KEYS:
        if wanted[key] != found[key]:
            raise ModelError(
                f"{place}: its model has {key}={found[key]}, the configuration says {key}={wanted[key]}"
            )


def _write_config(out_dir: Path, config: TrainConfig) -> None:
    partial = out_dir / f"{CONFIG_FILE}.partial"
    partial.write_text(to_yaml(config))
    partial.replace(out_dir / CONFIG_FILE)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; a second one kills as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for watched in (signal.SIGTERM, signal.SIGINT):
        previous[watched] = signal.signal(watched, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class _Trainer:
    """The loop over one run's resources."""

    config: TrainConfig
    model_config: ModelConfig
    steps: CompiledSteps
    checkpoints: Checkpoints
    feed: Feed
    evaluated: dict[str, tuple[Rows, int]]
    stop: list[int]

    def run(self, state: TrainState, first_step: int) -> RunResult:
        config = self.config
        log = MetricsLog(Path(config.out_dir) / METRICS_FILE, first_step=first_step + 1)
        if config.eval_only or first_step >= config.max_iters:
            found = self._evaluate(state)
            logger.info("step %d: %s", first_step, _describe(found))
            return RunResult(first_step, found.get("train_loss"), found.get("val_loss"))
        rate = _Rate(config, self.model_config, count_params(state.params), first_step)
        pending: StepMetrics | None = None
        values: dict[str, float] = {}
        losses: dict[str, float] = {}
        bar = tqdm(total=config.max_iters, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        with bar, logging_redirect_tqdm():
            for step in range(first_step + 1, config.max_iters + 1):
                state, metrics = self.steps.train(state, self._next_batch())
                if pending is not None:
                    # The step just dispatched runs while the one before is fetched.
                    values = self._log(log, step - 1, pending, rate, bar, {})
                pending = metrics
                last = step == config.max_iters
                evaluating = last or bool(self.stop) or step % config.eval_interval == 0
                saving = evaluating or step % (config.checkpoint_interval or config.eval_interval) == 0
                if saving:
                    losses = self._evaluate(state) if evaluating and not self.stop else {}
                    values = self._log(log, step, pending, rate, bar, losses)
                    pending = None
                    self._save(state, step, losses.get("val_loss"))
                    rate.restart()
                if self.stop:
                    self.checkpoints.wait()
                    name = signal.Signals(self.stop[0]).name
                    raise TrainingStoppedError(
                        self.stop[0], f"{name}: stopped at step {step}, saved; go on with init_from=resume"
                    )
        self.checkpoints.wait()
        return RunResult(config.max_iters, values["loss"], losses.get("val_loss"))

    def _next_batch(self) -> Batch:
        place = self.steps.micro_batches
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(place, leaf), next(self.feed))

    def _log(
        self,
        log: MetricsLog,
        step: int,
        metrics: StepMetrics,
        rate: "_Rate",
        bar: tqdm,
        losses: dict[str, float],
    ) -> dict[str, float]:
        """Fetch a step's metrics, check them, write and show them."""
        fetched = jax.device_get(metrics)
        loss = float(fetched.loss)
        values = {"loss": loss, "lr": float(fetched.learning_rate), **rate.measure(step), **losses}
        values |= {"grad_norm": float(fetched.grad_norm), "param_norm": float(fetched.param_norm)}
        if losses or step % self.config.log_interval == 0:
            log.write(step=step, tokens=step * self.config.tokens_per_step, **values)
        if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "param_norm")):
            newest = self.checkpoints.latest_step()
            mend = "begin anew" if newest is None else f"resume from step {newest}"
            raise ModelError(
                f"step {step}: the loss is {loss}, the gradient's norm {values['grad_norm']}, the parameters'"
                f" {values['param_norm']}; lower learning_rate and {mend}"
            )
        bar.set_postfix_str(
            _describe({key: values[key] for key in ("loss", "lr", "tokens_per_s", "mfu") if key in values})
        )
        bar.update(step - bar.n)
        if losses:
            logger.info("step %d: loss %.4f, %s", step, loss, _describe(losses))
        return values

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean losses of the targets in fixed batches of each set that is to be evaluated."""
        config = self.config
        found = {}
        for name, (rows, count) in self.evaluated.items():
            losses, weights = [], []
            for batch in evaluation_batches(
                rows, batch_size=config.batch_size, count=count, seed=config.seed
            ):
                placed = jax.device_put(batch, self.steps.batch)
                losses.append(self.steps.evaluate(state.params, placed))
                weights.append(batch.counted)
            found[name] = float(np.average(jax.device_get(losses), weights=weights))
        return found

    def _save(self, state: TrainState, step: int, val_loss: float | None) -> None:
        self.checkpoints.save(
            state,
            step=step,
            data_state=self.feed.get_state(),
            description={
                "model": dataclasses.asdict(self.model_config),
                "train": dataclasses.asdict(self.config),
                "vocab_size": self.model_config.vocab_size,
                "val_loss": val_loss,
                "versions": {
                    name: version(name)
                    for name in ("jax", "flax", "optax", "grain", "numpy", "orbax-checkpoint")
                },
                "python": platform.python_version(),
            },
            val_loss=val_loss,
        )


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


def _describe(values: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}" for name, value in values.items()
    )
