"""What a model card can say of a run without being told."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from crystallm_jax.config import load_config
from crystallm_jax.data.store import read_header
from crystallm_jax.errors import CrystallmError, DataError
from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.locate import bare_name
from crystallm_jax.models.runs import run_of
from crystallm_jax.train_run.metrics import METRICS_FILE, read_metrics
from crystallm_jax.train_run.names import CONFIG_FILE
from crystallm_jax.train_run.train_config import TrainConfig

# Of where and how a run was carried out, not of what it is.
_OF_THE_MACHINE = {
    "out_dir",
    "existing_run",
    "keep_checkpoints",
    "compilation_cache",
    "device",
    "distributed",
    "coordinator_address",
    "num_processes",
    "process_id",
    "local_device_ids",
    "tensorboard",
    "wandb",
    "wandb_project",
    "profile_steps",
}
_FIGURES = ("val_loss", "train_loss", "valid_share")


def card_of_run(path: Path) -> ModelCard:
    """A card made of what a run says of itself.

    Args:
        path: a run folder, or one of a run's checkpoints.

    Raises:
        CrystallmError: a configuration that cannot be read.
    """
    run = run_of(path)
    if run is None:
        return ModelCard()
    config = load_config(TrainConfig, run.folder / CONFIG_FILE)
    return ModelCard(
        data=_data(config.dataset),
        training_command=training_command(config),
        metrics=dict(_metrics(run.folder, run.step)),
    )


def training_command(config: TrainConfig) -> str:
    """The command that trains so: every setting that is not the default, paths by their last part."""
    defaults = asdict(TrainConfig())
    parts = ["crystallm", "train"]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _OF_THE_MACHINE or value == defaults[field.name]:
            continue
        if field.name in ("dataset", "init_from"):
            value = bare_name(value)
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        parts.append(f"{field.name}={text}")
    return shlex.join(parts)


def _data(dataset: str) -> str:
    name = Path(dataset).name
    try:
        header = read_header(dataset)
    except (CrystallmError, OSError):
        # It may lie on another machine.
        return name
    counts = ", ".join(
        f"{split.records:,} records for {'training' if key == 'train' else key}"
        for key, split in header.splits.items()
    )
    made_from = ", ".join(Path(source).name for source in header.sources)
    return f"{name}: {counts}" + (f"; made from {made_from}" if made_from else "")


def _metrics(run: Path, step: int | None) -> Iterator[tuple[str, float]]:
    """The newest figures up to a step."""
    try:
        lines = [
            line
            for line in read_metrics(run / METRICS_FILE)
            if step is None or int(line.get("step", 0)) <= step
        ]
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{run / METRICS_FILE}: cannot be read: {error.strerror}") from None
    for name in ("step", "tokens"):
        if lines and isinstance(lines[-1].get(name), int):
            yield name, lines[-1][name]
    for name in _FIGURES:
        found = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        if found:
            yield name, found[-1]
