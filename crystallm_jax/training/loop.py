"""The training loop: build, restore, step, report one step late, evaluate, save, stop when asked."""

import contextlib
import dataclasses
import logging
import math
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from crystallm_jax.config import load_config, to_yaml
from crystallm_jax.data.feed import Feed, open_feed
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ConfigError
from crystallm_jax.files import new_file
from crystallm_jax.hosts.distributed import (
    LateMaximum,
    Share,
    batch_share,
    is_writer,
    join,
    peers_watched,
    wait_for_all,
)
from crystallm_jax.model import ModelConfig, count_params
from crystallm_jax.model.compiler import use_compilation_cache
from crystallm_jax.signals import StopRequest, stop_between
from crystallm_jax.train_run.lock import sole_run
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, CONFIG_FILE
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.batches import PlacedBatches
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.early import Patience
from crystallm_jax.training.evaluate import Evaluator
from crystallm_jax.training.nonfinite import NonFiniteSteps
from crystallm_jax.training.runlog import RunLog, describe
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.start import start
from crystallm_jax.training.step import CompiledSteps, StepMetrics, TrainState, compile_steps

logger = logging.getLogger(__name__)

# (step, parameters as they are sharded, the model's shape) -> figures for the log.
Probe = Callable[[int, Any, ModelConfig], dict[str, float]]


class RunResult(NamedTuple):
    """Where a finished run stands; a loss that was not computed is None."""

    step: int
    loss: float | None
    val_loss: float | None


def run(config: TrainConfig, *, probe: Probe | None = None) -> RunResult:
    """Train as configured, from scratch, from other weights, or from where `out_dir` stands.

    Args:
        config: the run; its processes join here, unless they have already.
        probe: what is measured every `sample_interval` steps, given the weights that would be exported.

    Raises:
        CrystallmError: anything in the configuration, the data or the checkpoints that cannot be used.
        StoppedError: SIGTERM or Ctrl-C, to any process, after the state was saved by all.
        PeerLostError: another process of the run is gone.
    """
    if not config.dataset:
        raise ConfigError("dataset is not set: give dataset=DIR, a folder made by `crystallm prepare`")
    join(config)
    use_compilation_cache(config.compilation_cache)
    store = TokenStore.open(config.dataset)
    val_store = TokenStore.open(config.dataset, "val") if config.validate else None
    model_config = config.model_config(store.header.vocab_size)
    mesh = make_mesh(config.data_parallel, config.fsdp, tensor=config.tensor)
    steps = compile_steps(config, model_config, mesh)
    share = batch_share(steps.batch, config.batch_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(peers_watched())
        out_dir = stack.enter_context(_made(config.out_dir))
        checkpoints = stack.enter_context(Checkpoints(out_dir / CHECKPOINTS_FOLDER, config.keep_checkpoints))
        feed = stack.enter_context(contextlib.closing(_opened_feed(config, store, share)))
        state, first_step, patience = start(config, model_config, steps, checkpoints, feed)
        # An evaluation leaves the run that it is of as it was.
        if is_writer() and not (config.eval_only and first_step > 0):
            _write_config(out_dir, config)
        trainer = _Trainer(
            config,
            model_config,
            steps,
            checkpoints,
            PlacedBatches(feed, steps.micro_batches),
            Evaluator(config, steps, store, val_store, share),
            probe,
            NonFiniteSteps(config, feed),
            Patience(config.patience),
        )
        if patience is not None:
            trainer.patience.set_state(patience)
        num_params = count_params(steps.abstract.params)
        logger.info(
            "%s: %.2f M parameters, %d training records, %d devices, from step %d of %d",
            out_dir,
            num_params / 1e6,
            len(store),
            mesh.size,
            first_step,
            config.max_iters,
        )
        if config.eval_only or first_step >= config.max_iters or trainer.patience.exhausted:
            return trainer.evaluate_only(state, first_step)
        # Where a signal comes before, there is nothing to save.
        stop = stack.enter_context(
            stop_between(greatest=LateMaximum(mesh) if jax.process_count() > 1 else None)
        )
        log = stack.enter_context(
            RunLog.opened(
                config, model_config, num_params=num_params, first_step=first_step, writes=is_writer()
            )
        )
        return trainer.run(state, first_step, log, stop)


def _opened_feed(config: TrainConfig, store: TokenStore, share: Share) -> Feed:
    return open_feed(
        store,
        block_size=config.block_size,
        windows=config.windows,
        batch_size=config.batch_size,
        micro_batches=config.gradient_accumulation_steps,
        seed=config.seed,
        underrep_p=config.underrep_p,
        host=share.host,
        hosts=share.hosts,
    )


@contextlib.contextmanager
def _made(out_dir: str) -> Iterator[Path]:
    """The run folder, for this run alone."""
    if is_writer():
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out_dir={out_dir}: cannot be made: {error.strerror}") from None
    wait_for_all("out_dir")
    if not Path(out_dir).is_dir():
        raise ConfigError(
            f"out_dir={out_dir}: process 0 has made it, process {jax.process_index()} does not see it: choose a"
            " folder that all hosts share"
        )
    with sole_run(Path(out_dir)) if is_writer() else contextlib.nullcontext():
        yield Path(out_dir)


def _write_config(out_dir: Path, config: TrainConfig) -> None:
    # Which processes train is not of the run: another sitting may have others. That it was resumed is not either.
    alone = dataclasses.replace(
        config,
        init_from=_origin(out_dir / CONFIG_FILE, config),
        coordinator_address=None,
        num_processes=None,
        process_id=None,
        local_device_ids=None,
    )
    path = out_dir / CONFIG_FILE
    mend = "; make room or choose another out_dir"
    with new_file(path, ConfigError, mend=mend) as partial:
        partial.write_text(to_yaml(alone))


def _origin(written: Path, config: TrainConfig) -> str:
    """What the run began from, which a sitting that resumes it does not say."""
    if config.init_from != "resume" or not written.is_file():
        return config.init_from
    try:
        return load_config(TrainConfig, written).init_from
    except ConfigError as error:
        logger.warning("what the run began from is not known any more: %s", error)
        return config.init_from


@dataclasses.dataclass
class _Trainer:
    """The loop over one run's resources."""

    config: TrainConfig
    model_config: ModelConfig
    steps: CompiledSteps
    checkpoints: Checkpoints
    batches: PlacedBatches
    evaluator: Evaluator
    probe: Probe | None
    non_finite: NonFiniteSteps
    patience: Patience

    def evaluate_only(self, state: TrainState, step: int) -> RunResult:
        """Losses of a state as it is."""
        found = self.evaluator.losses(state.exported)
        logger.info("step %d: %s", step, describe(found))
        return RunResult(step, found.get("train_loss"), found.get("val_loss"))

    def run(self, state: TrainState, first_step: int, log: RunLog, stop: StopRequest) -> RunResult:
        """Train to the last step."""
        config = self.config
        pending: StepMetrics | None = None
        loss = math.nan
        losses: dict[str, float] = {}
        for step in range(first_step + 1, config.max_iters + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = self.steps.train(state, self.batches.take())
            last = step == config.max_iters
            if not last:
                self.batches.prefetch()
            if pending is not None:
                # The step just dispatched runs while the one before is fetched.
                loss = self._report(log, step - 1, pending, {})
            pending = metrics
            stopping = stop.agreed()
            evaluating = not stopping and (last or step % config.eval_interval == 0)
            probing = self._probing(step) and not stopping
            saving = stopping or last or step % (config.checkpoint_interval or config.eval_interval) == 0
            if evaluating or probing or saving:
                jax.block_until_ready(metrics)
                log.stop_clock()
                losses = self._evaluate(state, step, evaluating=evaluating, probing=probing)
                self.patience.note(step, losses.get("val_loss"))
                loss = self._report(log, step, pending, losses)
                pending = None
                if saving or evaluating:
                    self._save(state, step, losses.get("val_loss"))
                log.restart_clock()
            if stopping:
                self._end(step, stop)
            if self.patience.exhausted:
                logger.info("step %d: %s: the run ends here", step, self.patience)
                break
        self.checkpoints.wait()
        return RunResult(step, loss, losses.get("val_loss"))

    def _probing(self, step: int) -> bool:
        interval = self.config.sample_interval
        return self.probe is not None and interval > 0 and step % interval == 0

    def _evaluate(self, state: TrainState, step: int, *, evaluating: bool, probing: bool) -> dict[str, float]:
        found = self.evaluator.losses(state.exported) if evaluating else {}
        if probing and self.probe is not None:
            found |= self.probe(step, state.exported, self.model_config)
        return found

    def _report(self, log: RunLog, step: int, metrics: StepMetrics, losses: dict[str, float]) -> float:
        """Fetch a step's metrics, check them, write and show them; returns the loss."""
        fetched = jax.device_get(metrics)
        values = {
            "loss": float(fetched.loss),
            "lr": float(fetched.learning_rate),
            "grad_norm": float(fetched.grad_norm),
            "param_norm": float(fetched.param_norm),
            "update_norm": float(fetched.update_norm),
            "skipped": int(fetched.skipped),
            "data_wait_s": round(self.batches.take_waited(), 6),
        }
        log.step(step, values, losses)
        self.checkpoints.check()
        self.non_finite.check(step, fetched, self.checkpoints.latest_step())
        return values["loss"]

    def _save(self, state: TrainState, step: int, val_loss: float | None) -> None:
        self.checkpoints.save(
            state,
            step=step,
            data_state=self.batches.get_state(),
            description={
                "model": dataclasses.asdict(self.model_config),
                "train": dataclasses.asdict(self.config),
                "vocab_size": self.model_config.vocab_size,
                "patience": self.patience.get_state(),
                "random": "dropout: fold_in(fold_in(key(train.seed), step - 1), micro-batch); data: its own state",
                "versions": {
                    name: version(name)
                    for name in ("jax", "flax", "optax", "grain", "numpy", "orbax-checkpoint")
                },
                "python": platform.python_version(),
            },
            val_loss=val_loss,
        )

    def _end(self, step: int, stop: StopRequest) -> None:
        self.checkpoints.wait()
        raise stop.stopped(f"stopped at step {step}, saved; go on with init_from=resume")
