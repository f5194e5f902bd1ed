"""Training on a bare machine until a given second: the package's own step, evaluation and checkpoints, without grain.

A stable rate, then a linear decay that the clock ends. Full checkpoints of the stable stage lie in the work folder, for
a call on the same machine; what comes back is written beside them every so often, and at the end.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from accelerator_batches import Batches
from accelerator_clock import Clock, at_decay, decayed_rate
from accelerator_parts import Outbox, Returned, check_size
from accelerator_shipment import Shipment

from crystallm_jax.data.rows import Rows, open_rows
from crystallm_jax.errors import ModelError
from crystallm_jax.files import new_file
from crystallm_jax.hosts.distributed import Share
from crystallm_jax.model import ModelConfig, count_params, flops_per_token
from crystallm_jax.signals import StopRequest, stop_between
from crystallm_jax.train_run.lock import sole_run
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.chips import device_peak_flops
from crystallm_jax.training.evaluate import Evaluator
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import CompiledSteps, StepMetrics, TrainState, compile_steps, initial_state

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
LOG_EVERY = 10
# In a row, that changed nothing because they were not finite: the run will not recover.
MOST_SKIPPED = 100


class Place(NamedTuple):
    """Where a run stands: its steps and the rows that they have read, of all calls together."""

    step: int
    rows_read: int


class Start(NamedTuple):
    """What a call begins with, and where that is from: `scratch`, `checkpoint` or `parts`."""

    state: TrainState
    place: Place
    origin: str


def train(
    shipment: Shipment,
    outbox: Outbox,
    report: dict[str, Any],
    *,
    clock: Clock,
    work: Path,
    returned: Returned | None,
    save_every: float,
) -> int | None:
    """Train until the time is over or a signal comes; returns the signal's number, or None.

    Args:
        shipment: settings and tokens.
        outbox: where what comes back is written.
        report: what it says so far; where the training stands is added.
        clock: says when the decay begins and ends.
        work: for checkpoints and compiled steps.
        returned: what came back from an earlier call, gone on with where `work` holds no checkpoint.
        save_every: seconds between evaluations, each followed by a checkpoint and by weights for `outbox`.

    Raises:
        CrystallmError: a configuration or checkpoint that cannot be used, no time, or a run that diverges.
    """
    config = shipment.config
    model_config = config.model_config(shipment.store.header.vocab_size)
    steps = compile_steps(config, model_config, make_mesh(1, 1, jax.devices()[:1]))
    check_size(count_params(steps.abstract.params))
    rows = _rows(shipment)
    evaluator = Evaluator(config, steps, shipment.store, shipment.val_store, Share(0, 1))
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_run(work))
        checkpoints = stack.enter_context(Checkpoints(work / CHECKPOINTS, keep=1))
        begun = _begin(config, model_config, steps, checkpoints=checkpoints, returned=returned)
        batches = stack.enter_context(_batches(rows, config, first_row=begun.place.rows_read, steps=steps))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        run = _Run(config, model_config, steps, evaluator, checkpoints, batches, outbox, report, clock, work)
        run.describe(begun, rows, save_every=save_every)
        stop = stack.enter_context(stop_between())
        return run.go(begun, stop, pool, save_every=save_every)


def _rows(shipment: Shipment) -> Rows:
    config = shipment.config
    return open_rows(shipment.store, block_size=config.block_size, windows=config.windows, seed=config.seed)


@contextlib.contextmanager
def _batches(rows: Rows, config: TrainConfig, *, first_row: int, steps: CompiledSteps) -> Iterator[Batches]:
    batches = Batches(rows, config, first_row=first_row, sharding=steps.micro_batches)
    with contextlib.closing(batches):
        yield batches


def _begin(
    config: TrainConfig,
    model_config: ModelConfig,
    steps: CompiledSteps,
    *,
    checkpoints: Checkpoints,
    returned: Returned | None,
) -> Start:
    """A checkpoint at hand before parts: it has the optimiser's state, and was not decayed."""
    if checkpoints.latest_step() is not None:
        restored = checkpoints.restore(steps.abstract)
        return Start(restored.state, Place(restored.step, restored.data_state["rows_read"]), "checkpoint")
    if returned is None:
        return Start(initial_state(config, model_config, steps), Place(0, 0), "scratch")
    weights, report = returned
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"):
        if (found := getattr(weights.config, key)) != (wanted := getattr(model_config, key)):
            raise ModelError(f"--resume-from: its model has {key}={found}, the shipment says {key}={wanted}")
    stood = report["training"]
    place = Place(int(stood["step"]), int(stood["rows_read"]))
    return Start(initial_state(config, model_config, steps, weights.params), place, "parts")


@dataclass
class _Run:
    """The loop over one call's resources."""

    config: TrainConfig
    model_config: ModelConfig
    steps: CompiledSteps
    evaluator: Evaluator
    checkpoints: Checkpoints
    batches: Batches
    outbox: Outbox
    report: dict[str, Any]
    clock: Clock
    work: Path
    lines: list[str] = field(default_factory=list)
    writing: Future[None] | None = None
    paused: float = 0.0
    finite: int = 0

    def describe(self, begun: Start, rows: Rows, *, save_every: float) -> None:
        """Say in the report what is trained, and take up the figures that there are."""
        config = self.config
        self.report["settings"] = asdict(config) | {"save_every": save_every}
        self.report["training"] = {
            "started_from": begun.origin,
            "first_step": begun.place.step,
            "rows": len(rows),
            "parameters": count_params(self.steps.abstract.params),
        }
        kept = self.work / METRICS
        if begun.origin == "checkpoint" and kept.is_file():
            lines = kept.read_text(encoding="utf-8").splitlines()
            self.lines = [line for line in lines if json.loads(line)["step"] <= begun.place.step]

    def go(
        self, begun: Start, stop: StopRequest, pool: ThreadPoolExecutor, *, save_every: float
    ) -> int | None:
        """Train to the end of the time."""
        state, place = begun.state, begun.place
        self.finite = int(state.skipped)
        batch = self.batches.take()
        compiling = time.monotonic()
        step = self.steps.train.lower(state, batch).compile()  # type: ignore[attr-defined]
        self.report["training"]["compile_s"] = round(time.monotonic() - compiling, 1)
        self.clock.begin()
        first, trained_from, saved = place.step, time.monotonic(), time.monotonic()
        pending: tuple[int, float, StepMetrics] | None = None
        decaying = False
        while (progress := self.clock.progress(place.step)) < 1 and not stop.agreed():
            due = time.monotonic() - saved >= save_every and not decaying
            if place.step > first and (due or (progress >= 0 and not decaying)):
                self._save(state, place, pool, since=(first, trained_from), ended=None)
                saved = time.monotonic()
            decaying = decaying or progress >= 0
            if decaying:
                state = at_decay(state, self.config, max(progress, 0.0))
            state, metrics = step(state, batch)
            place = Place(place.step + 1, place.rows_read + self.batches.rows_a_step)
            batch = self.batches.take()
            if pending is not None:
                # The step just dispatched runs while the one before is fetched.
                self._note(*pending)
            pending = (place.step, progress, metrics)
        if pending is not None:
            self._note(*pending, keep=True)
        ended = "end" if stop.signal_number is None else "signal"
        decay = min(max(progress, 0.0), 1.0) if decaying else 0.0
        self._save(state, place, pool, since=(first, trained_from), ended=ended, decay=decay)
        self._written()
        self.checkpoints.wait()
        return stop.signal_number

    def _note(self, step: int, progress: float, metrics: StepMetrics, *, keep: bool = False) -> None:
        """Fetch a step's metrics, and keep those of every few steps, or of this one in any case.

        Raises:
            ModelError: steps are not finite again and again.
        """
        fetched = jax.device_get(metrics)
        if math.isfinite(fetched.grad_norm) and math.isfinite(fetched.loss):
            self.finite = int(fetched.skipped)
        elif int(fetched.skipped) - self.finite >= MOST_SKIPPED:
            raise ModelError(
                f"step {step}: {MOST_SKIPPED} steps in a row were not finite: pack a lower learning_rate"
            )
        if step % LOG_EVERY and not keep:
            return
        rate = float(fetched.learning_rate) if progress < 0 else decayed_rate(self.config, progress)
        values = {
            "step": step,
            "seconds": round(self.clock.elapsed(), 2),
            "loss": float(fetched.loss),
            "lr": rate,
            "grad_norm": float(fetched.grad_norm),
            "update_norm": float(fetched.update_norm),
            "skipped": int(fetched.skipped),
        }
        self.lines.append(json.dumps(values))

    def _save(
        self,
        state: TrainState,
        place: Place,
        pool: ThreadPoolExecutor,
        *,
        since: tuple[int, float],
        ended: str | None,
        decay: float = 0.0,
    ) -> None:
        """Evaluate, save the state where the rate is stable, and have a thread write what comes back."""
        jax.block_until_ready(state)
        begun = time.monotonic()
        seconds = begun - since[1] - self.paused
        losses = self.evaluator.losses(state.exported)
        self.lines.append(
            json.dumps({"step": place.step, "seconds": round(self.clock.elapsed(), 2), **losses})
        )
        self.report["training"] |= self._standing(place, place.step - since[0], seconds) | losses
        self.report["training"] |= {"decay": decay, "ended": ended}
        text = "".join(f"{line}\n" for line in self.lines)
        with new_file(self.work / METRICS, ModelError) as partial:
            partial.write_text(text, encoding="utf-8")
        if decay == 0:
            self._checkpoint(state, place, losses)
        host = jax.device_get(state.exported)
        self._written()
        self.writing = pool.submit(self._write, host, json.loads(json.dumps(self.report)), text)
        self.paused += time.monotonic() - begun
        print(
            f"step {place.step}: {', '.join(f'{name} {value:.4f}' for name, value in losses.items())},"
            f" {self.report['training']['tokens_per_s']:,.0f} tokens/s, {self.clock.elapsed():.0f} s",
            flush=True,
        )

    def _standing(self, place: Place, made: int, seconds: float) -> dict[str, Any]:
        device = jax.devices()[0]
        rate = made * self.config.tokens_per_step / seconds if seconds > 0 else 0.0
        found: dict[str, Any] = {
            "step": place.step,
            "rows_read": place.rows_read,
            "epochs": place.rows_read / self.report["training"]["rows"],
            "seconds": round(seconds, 2),
            "tokens_per_s": round(rate),
            "peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        }
        # Of a CPU the peak would have to be measured.
        if device.platform != "cpu" and (peak := device_peak_flops(self.config.dtype)):
            flops = flops_per_token(self.model_config, self.report["training"]["parameters"])
            found["mfu"] = rate * flops / peak
        return found

    def _checkpoint(self, state: TrainState, place: Place, losses: dict[str, float]) -> None:
        if self.checkpoints.latest_step() == place.step:
            return
        self.checkpoints.save(
            state,
            step=place.step,
            data_state={"rows_read": place.rows_read},
            description={
                "model": asdict(self.model_config),
                "train": asdict(self.config),
                "vocab_size": self.model_config.vocab_size,
            },
            val_loss=losses.get("val_loss"),
        )

    def _write(self, params: Any, report: dict[str, Any], metrics: str) -> None:
        weights = self.outbox.write_weights(params, self.model_config)
        self.outbox.write_metrics(metrics)
        self.outbox.write_report(report | {"weights": weights | {"step": report["training"]["step"]}})

    def _written(self) -> None:
        """Wait for what is being written.

        Raises:
            CrystallmError: it could not be.
        """
        if self.writing is not None:
            self.writing.result()
            self.writing = None
