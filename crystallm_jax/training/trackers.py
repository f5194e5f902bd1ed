"""Where a run's figures go besides `metrics.jsonl`, if asked: TensorBoard's event files, Weights & Biases.

Both go on with the same curves when a run is resumed, and neither can end a run that is under way.
"""

import logging
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from crystallm_jax.errors import ConfigError
from crystallm_jax.files import new_file
from crystallm_jax.train_run.train_config import TrainConfig

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id"
_FLUSH_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Somewhere that figures are sent to."""

    @property
    def name(self) -> str:
        """The configuration key that asks for it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures of a step."""

    def close(self) -> None:
        """Send what is left."""


class RefusedError(ConfigError):
    """A service does not take the run now; at another time it may."""


class EventFile:
    """TensorBoard's event file of one session; what earlier sessions wrote of its first step and later is void.

    It is written in this thread: a writer with a queue behind it would hang a run whose disk is full.

    Args:
        folder: where TensorBoard will look; other sessions' files stay.
        first_step: the first that this session writes.

    Raises:
        ConfigError: the package that knows the format is missing, or the folder cannot be written.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, *, first_step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415 - an extra
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415
        except ImportError as error:
            raise _missing("tensorboard", error) from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # Its readers take the files in the order of their names.
        path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(path.open("wb"))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written: {error.strerror}; or set tensorboard=false"
            ) from None
        self._flushed = time.monotonic()
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=started))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append an event with all figures."""
        value = self._summary.Value
        summary = self._summary(value=[value(tag=tag, simple_value=number) for tag, number in values.items()])
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is buffered."""
        self._file.flush()
        self._file.close()

    def _append(self, event: Any) -> None:
        self._file.write(event.SerializeToString())


class WandbRun:
    """A run on Weights & Biases, whose id is kept in the run folder so that a resumed run goes on with it.

    Args:
        config: of the run.

    Raises:
        ConfigError: the package is missing.
        RefusedError: the service does not take the run.
    """

    name = "wandb"

    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise _missing("wandb", error) from None
        out_dir = Path(config.out_dir)
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=out_dir.resolve().name,
                id=_kept_id(out_dir / WANDB_ID_FILE),
                resume="allow",
                dir=str(out_dir),
                config=asdict(config),
            )
        except Exception as error:  # noqa: BLE001 - whatever the service's client raises becomes one line
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RefusedError(
                f"wandb=true: the run cannot be opened ({reason}); log in with `wandb login`, set WANDB_MODE=offline,"
                " or set wandb=false"
            ) from None
        # The service takes each step once and in order: those that are redone stand there already.
        self._next_step = int(self._run.starting_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step that the service does not have yet."""
        if step >= self._next_step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the session."""
        self._run.finish()


class Trackers:
    """All trackers that a configuration asks for; a context manager.

    One that fails in the middle of a run (a network, a disk), or when one is resumed, is warned of once and then left
    out.

    Args:
        config: of the run.
        first_step: the first that this session writes.

    Raises:
        ConfigError: one cannot be opened.
    """

    def __init__(self, config: TrainConfig, *, first_step: int) -> None:
        self._open: list[Tracker] = []
        if config.tensorboard:
            self._open.append(EventFile(Path(config.out_dir) / TENSORBOARD_FOLDER, first_step=first_step))
        if config.wandb:
            try:
                self._open.append(WandbRun(config))
            except RefusedError as error:
                if first_step == 1:
                    raise
                # A scheduler that starts the run again has nobody to read this at once.
                logger.warning("%s: the run goes on without it, metrics.jsonl has all figures", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in tuple(self._open):
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - said; the run's own files are whole
                self._leave(tracker, error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures of a step to each."""
        for tracker in tuple(self._open):
            try:
                tracker.write(step, values)
            except Exception as error:  # noqa: BLE001 - said; what the run is for must not end with it
                self._leave(tracker, error)

    def _leave(self, tracker: Tracker, error: Exception) -> None:
        self._open.remove(tracker)
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning(
            "%s failed (%s): the run goes on without it, metrics.jsonl has all figures", tracker.name, reason
        )


def _missing(package: str, error: ImportError) -> ConfigError:
    reason = "is not installed" if error.name == package else f"cannot be imported ({error})"
    return ConfigError(
        f"{package}=true: {package} {reason}; pip install 'crystallm-jax[{package}]', or set {package}=false"
    )


def _kept_id(path: Path) -> str:
    """The id in this file, which is made where there is none."""
    if not path.is_file():
        with new_file(path, ConfigError) as partial:
            partial.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
