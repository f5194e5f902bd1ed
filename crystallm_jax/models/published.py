"""Published PyTorch checkpoints (`ckpt.pt`), both ways.

Such a checkpoint is a dictionary of `model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss` and `config`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.model import Model, Training
from crystallm_jax.models.parameters import params_from_tensors, published_arrays
from crystallm_jax.models.published_optimizer import optimizer_state, read_count, read_moments
from crystallm_jax.models.torch_file import StoredTensor, open_torch_file
from crystallm_jax.models.torch_write import write_torch_file

# What compiled models and those trained by several processes put before every name.
_WRAPPERS = ("_orig_mod.", "module.")
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
# The validation loss of the published code before it has one; without validation it saves 0.
_NO_LOSS = 1e9
_OPTIMIZER_SETTINGS = ("learning_rate", "beta1", "beta2", "weight_decay")

PUBLISHED_DEFAULTS: Mapping[str, Any] = {
    "out_dir": "out",
    "eval_interval": 250,
    "log_interval": 1,
    "eval_iters_train": 200,
    "eval_iters_val": 200,
    "eval_only": False,
    "always_save_checkpoint": False,
    "init_from": "scratch",
    "dataset": "",
    "gradient_accumulation_steps": 40,
    "batch_size": 64,
    "block_size": 2048,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600_000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600_000,
    "min_lr": 6e-5,
    "device": "cuda",
    "dtype": "bfloat16",
    "compile": True,
    "underrep_p": 0.0,
    "validate": False,
}
"""The settings that the published training code knows, and what it takes where none is given."""


def read_published(path: str | Path) -> Model:
    """Read a published `ckpt.pt` but for the optimiser's moments, which are left on disk, unseen.

    Raises:
        ModelError: not such a file, a tensor missing, left over, of another shape or type or not finite, or something
            in it that a checkpoint has no need of.
    """
    with open_torch_file(path) as saved:
        return _read_weights(saved, path)


def read_published_training(path: str | Path) -> Model:
    """Read a published `ckpt.pt` with the optimiser's moments; None where it has made no update yet.

    Raises:
        ModelError: as of `read_published`; or the optimiser is no AdamW over the parameters of the model.
    """
    with open_torch_file(path) as saved:
        weights = _read_weights(saved, path)
        moments = read_moments(saved.get("optimizer"), weights.config, place=str(path))
        return replace(weights, training=replace(weights.training or Training(0), moments=moments))


def write_published(path: str | Path, weights: Model) -> None:
    """Write a `ckpt.pt` that the published code loads, samples from and resumes.

    Of the settings those are written that the published code knows; the others are left out, and it takes its defaults
    for those that are missing. Without moments the optimiser is saved as one that has made no update: the published
    code resumes from it too, at the same step, with moments that begin at zero.

    Args:
        path: the file, replaced where it exists; it appears under its name when it is complete.
        weights: what to write. To be trained on, their parameters must be those that the moments are of, not their
            moving average.

    Raises:
        ModelError: it cannot be written.
    """
    config = weights.config
    training = weights.training or Training(0)
    model_args = {name: getattr(config, name) for name in (*_SHAPE_KEYS, "dropout")}
    shape = {name: value for name, value in model_args.items() if name in PUBLISHED_DEFAULTS}
    given = {name: training.settings[name] for name in PUBLISHED_DEFAULTS if name in training.settings}
    settings = {**PUBLISHED_DEFAULTS, **given, **shape}
    for name in _OPTIMIZER_SETTINGS:
        value = settings[name]
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ModelError(
                f"{path}: {name}={value!r} in the model's settings is no number: mend its source"
            )
    model = dict(published_arrays(weights.params, config))
    best = _NO_LOSS if training.best_val_loss is None else float(training.best_val_loss)
    write_torch_file(
        path,
        {
            "model": model | {_HEAD: model[_EMBEDDING]},
            "optimizer": optimizer_state(training.moments, config, settings),
            "model_args": model_args,
            "iter_num": training.step,
            "best_val_loss": best,
            "config": settings,
        },
    )


def _read_weights(saved: Any, path: str | Path) -> Model:
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ModelError(f"{path}: not a published checkpoint: it has no `model` and `model_args`")
    if not isinstance(saved["model"], dict):
        raise ModelError(f"{path}: its `model` is no table of tensors")
    config = _model_config(saved["model_args"], path)
    tensors = _unwrapped(saved["model"], path)
    if config.n_layer > len(tensors):
        raise ModelError(
            f"{path}: {len(tensors)} tensors are too few for the {config.n_layer} layers that it states"
        )
    for layer in range(config.n_layer):
        # The causal mask, which PyTorch before 2.0 needed, is no parameter.
        mask = tensors.get(f"transformer.h.{layer}.attn.bias")
        if isinstance(mask, StoredTensor) and mask.shape == (1, 1, config.block_size, config.block_size):
            del tensors[f"transformer.h.{layer}.attn.bias"]
    head = tensors.pop(_HEAD, tensors.get(_EMBEDDING))
    params = params_from_tensors(tensors, config, place=str(path))
    if head != tensors[_EMBEDDING] and not _equals(head, params["wte"]["embedding"]):
        raise ModelError(f"{path}: its output layer is not its token embedding; only tied models are known")
    step = read_count(saved.get("iter_num", 0), f"{path}: its iter_num")
    return Model(config, params, Training(step, _best_loss(saved), _settings(saved)))


def _unwrapped(model: Mapping[Any, Any], path: str | Path) -> dict[str, Any]:
    """Tensors by their names, without what was put before these."""
    tensors: dict[str, Any] = {}
    for key, value in model.items():
        name = str(key)
        while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
            name = name.removeprefix(wrapper)
        if name in tensors:
            raise ModelError(f"{path}: tensor {name} is there twice")
        tensors[name] = value
    return tensors


def _equals(head: Any, embedding: Any) -> bool:
    same = isinstance(head, StoredTensor) and head.shape == embedding.shape
    return same and bool((head.read() == embedding).all())


def _best_loss(saved: Mapping[str, Any]) -> float | None:
    best = saved.get("best_val_loss")
    if isinstance(best, StoredTensor) and best.shape == ():
        best = best.read().item()
    known = isinstance(best, int | float) and math.isfinite(best) and 0 < best < _NO_LOSS
    return float(best) if known else None  # type: ignore[arg-type]  # it is a number


def _settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among the settings of the run."""
    config = saved.get("config")
    if not isinstance(config, dict):
        return {}
    return {
        str(name): value
        for name, value in config.items()
        if value is None or type(value) in (bool, int, float, str)
    }


def _model_config(model_args: Any, path: str | Path) -> ModelConfig:
    try:
        return ModelConfig(
            n_layer=int(model_args["n_layer"]),
            n_head=int(model_args["n_head"]),
            n_embd=int(model_args["n_embd"]),
            block_size=int(model_args["block_size"]),
            vocab_size=int(model_args["vocab_size"]),
            bias=bool(model_args["bias"]),
            dropout=float(model_args.get("dropout", 0.0)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        missing = sorted(set(_SHAPE_KEYS) - set(model_args)) if isinstance(model_args, dict) else []
        reason = f"lacks {', '.join(missing)}" if missing else str(error)
        raise ModelError(f"{path}: its model_args cannot be used: {reason}") from None
