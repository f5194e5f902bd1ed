"""The configurations that ship: the published ones as published, the fast ones the same run but for what they name."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from crystallm_jax.config import find_config, load_config
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import learning_rate_schedule

FOLDER = Path(__file__).parents[1] / "configs"
SETS = {
    "perov_5": (1750, 4),
    "carbon_24": (8000, 2),
    "mp_20": (5000, 4),
    "mpts_52": (3500, 4),
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"batch_size": 32, "block_size": 1024, "n_layer": 8, "n_head": 8, "n_embd": 512},
    "large": {"batch_size": 16, "block_size": 2048, "n_layer": 16, "n_head": 16, "n_embd": 1024},
}
# What all published configurations say, and what the published code takes where they are silent.
COMMON = {
    "eval_interval": 250,
    "eval_iters_train": 200,
    "log_interval": 1,
    "always_save_checkpoint": True,
    "dropout": 0.1,
    "bias": False,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "decay_lr": True,
    "warmup_iters": 100,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "grad_clip": 1.0,
    "seed": 1337,
    "underrep_p": 0.0,
    "init_from": "scratch",
    "eval_iters_val": 200,
    "eval_only": False,
}
# What ours add must be off in them.
OURS = {
    "optimizer": "adamw",
    "ema_decay": 0.0,
    "patience": 0,
    "windows": "starts",
    "attention_dropout": None,
    "existing_run": "refuse",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    **{
        f"crystallm_{name}_{size}": {
            **shape,
            "max_iters": steps,
            "gradient_accumulation_steps": micro_batches,
            "validate": True,
            "dataset": f"out/tokens_{name}",
        }
        for name, (steps, micro_batches) in SETS.items()
        for size, shape in SHAPES.items()
    },
    **{
        f"crystallm_{name}": {
            **SHAPES[name.rsplit("_", 1)[1]],
            "max_iters": steps,
            "gradient_accumulation_steps": 40,
            "validate": False,
            "dataset": dataset,
        }
        for name, steps, dataset in (
            ("v1_small", 100_000, "out/tokens_v1_all"),
            ("v1_large", 48_000, "out/tokens_v1_all"),
            ("v1_minus_mpts_52_small", 100_000, "out/tokens_v1_mpts_52_all"),
        )
    },
}
FAST = sorted(FOLDER.glob("fast_*.yaml"))
# In the form of the published files: quotes, capitals, comments, and keys that mean nothing here.
PUBLISHED_FORM = """
out_dir: 'out/my_model'
eval_interval: 250  # how often to evaluate
eval_iters_train: 200
log_interval: 1

# a comment of its own
always_save_checkpoint: True

validate: False
dataset: 'out/tokens'
init_from: 'scratch'  # or 'resume'
gradient_accumulation_steps: 40
batch_size: 32
block_size: 1024

n_layer: 8
n_head: 8
n_embd: 512
dropout: 0.1
bias: False

learning_rate: 1e-3
max_iters: 100000
lr_decay_iters: 100000
min_lr: 1e-4
beta2: 0.99
warmup_iters: 100

device: 'cuda'
dtype: 'bfloat16'
compile: True
underrep_p: 0.0
"""


def _load(name: str) -> TrainConfig:
    return load_config(TrainConfig, find_config(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_published_settings(name: str) -> None:
    config = _load(name)
    wanted = {**COMMON, **OURS, **PUBLISHED[name], "lr_decay_iters": PUBLISHED[name]["max_iters"]}
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.out_dir == f"out/{name}"


def test_every_published_model_is_there() -> None:
    assert {path.stem for path in FOLDER.glob("crystallm_*.yaml")} == PUBLISHED.keys()


def test_a_published_step_reads_as_many_tokens_as_published() -> None:
    tokens = {name: _load(f"crystallm_{name}").tokens_per_step for name in ("v1_small", "v1_large")}
    assert tokens == {"v1_small": 1_310_720, "v1_large": 1_310_720}


def test_a_file_in_the_published_form_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "published.yaml"
    file.write_text(PUBLISHED_FORM)
    config = load_config(TrainConfig, file)
    shipped = _load("crystallm_v1_small")
    same = {field.name for field in fields(TrainConfig)} - {"out_dir", "dataset"}
    assert {key: getattr(config, key) for key in same} == {key: getattr(shipped, key) for key in same}
    assert config.out_dir == "out/my_model"
    assert float(learning_rate_schedule(config)(100)) == pytest.approx(1e-3)


@pytest.mark.parametrize("path", FAST, ids=lambda path: path.stem)
def test_a_fast_model_is_the_published_one_but_for_what_it_names(path: Path) -> None:
    fast = load_config(TrainConfig, path)
    name = path.stem.removeprefix("fast_")
    published = _load(name if name in SHAPES else f"crystallm_{name}")
    changed = {
        field.name
        for field in fields(TrainConfig)
        if getattr(fast, field.name) != getattr(published, field.name)
    }
    assert changed <= {
        "out_dir",
        "dataset",
        "existing_run",
        "always_save_checkpoint",
        "eval_iters_train",
        "eval_iters_val",
        "patience",
        "windows",
        "gradient_accumulation_steps",
        "batch_size",
        "attention_dropout",
        "grad_clip",
        "optimizer",
        "ema_decay",
    }
    assert fast.tokens_per_step == published.tokens_per_step
    # Summed gradients are clipped: the clip must shrink with their number.
    assert fast.grad_clip / fast.gradient_accumulation_steps == pytest.approx(
        published.grad_clip / published.gradient_accumulation_steps
    )
    # The kernels that make it fast take no dropout, and packing wants long rows.
    assert fast.model_config(371).attention_dropout_rate == 0
    assert fast.dropout == published.dropout
    assert (fast.dtype, fast.windows, fast.validate, fast.existing_run) == (
        "bfloat16",
        "packed",
        True,
        "resume",
    )
    assert fast.block_size >= 1024
    assert fast.optimizer == "muon"


def test_there_is_a_fast_configuration_for_every_model() -> None:
    wanted = {f"fast_{name}_{size}" for name in SETS for size in SHAPES} | {"fast_small", "fast_large"}
    assert {path.stem for path in FAST} == wanted


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_says_how_to_run_it(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("train" in line and path.stem in line for line in head), "the command"
    if path.stem.startswith(("fast_", "crystallm_")):
        for fact in ("# Hardware: ", "# Time: ", "# Loss: "):
            assert sum(line.startswith(fact) for line in head) == 1, fact


def test_fine_tuning_fits_the_model_in_the_package() -> None:
    packaged = load_config(TrainConfig, FOLDER / "default.yaml")
    config = _load("finetune")
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias"):
        assert getattr(config, key) == getattr(packaged, key)
    assert config.init_from == "default"
