"""Packing for a bare machine: the recipe of the model in the package, for a larger model and a time that is given."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerator_shipment import pack_golden, pack_tokens, write_settings

from crystallm_jax.config import find_config, load_config
from crystallm_jax.errors import ConfigError
from crystallm_jax.train_run.train_config import TrainConfig

RECIPE, SHAPE = "default", "small"
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size")
# What an accelerator wants: large batches, 16-bit arithmetic, the fused attention, one block compiled for all layers.
# A step that is not finite must not end the one run that there is; and the whole validation set is read, however large.
ACCELERATOR = (
    "batch_size=64",
    "dtype=bfloat16",
    "attention_dropout=0.0",
    "layers=scanned",
    "non_finite=skip",
    "validate=true",
    "eval_iters_val=1000000",
)
# Of the schedule the clock decides: `accelerator_training` moves the count to the stage that is due.
STAGE = 1_000_000
SCHEDULE = {
    "decay_lr": "true",
    "lr_schedule": "wsd",
    "max_iters": str(2 * STAGE),
    "decay_iters": str(STAGE),
    "windows": "packed",
}


def pack(dataset: Path, out: Path, *, golden: Path | None, overrides: Sequence[str]) -> TrainConfig:
    """Make a shipment, or bring one up to date.

    Args:
        dataset: a prepared folder with train and val.
        out: the shipment.
        golden: the folder of golden files; None packs none.
        overrides: `key=value` settings over those of the recipe.

    Raises:
        CrystallmError: settings, data or golden files that cannot be used.
    """
    for text in overrides:
        key = text.partition("=")[0]
        if key in SCHEDULE:
            raise ConfigError(
                f"{text}: {key} is {SCHEDULE[key]} here: the time that is given to `run` decides"
            )
    shape = load_config(TrainConfig, find_config(SHAPE))
    config = load_config(
        TrainConfig,
        find_config(RECIPE),
        [
            *(f"{key}={getattr(shape, key)}" for key in SHAPE_KEYS),
            *ACCELERATOR,
            *(f"{key}={value}" for key, value in SCHEDULE.items()),
            *overrides,
        ],
    )
    pack_tokens(dataset, out)
    pack_golden(golden, out)
    write_settings(asdict(config), dataset.resolve().name, out)
    return config
