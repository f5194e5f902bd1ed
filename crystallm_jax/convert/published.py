"""Published PyTorch checkpoints (`ckpt.pt`): names and shapes of their tensors against ours.

A published checkpoint is a dictionary of `model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss` and
`config`. Its linear weights are stored as [out, in]; ours as [in, out]. The output layer is the token embedding
under a second name.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.convert.torch_file import read_torch_file
from crystallm_jax.convert.weights import Training, Weights
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.model.config import ModelConfig

COMPILED_PREFIX = "_orig_mod."
_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")


def read_published(path: str | Path) -> Weights:
    """Read a published `ckpt.pt` into parameters of ours; every tensor is checked by name and shape.

    Raises:
        ModelError: not such a file, a tensor missing, left over or of another shape, or something in it that a
            checkpoint has no need of.
    """
    saved = read_torch_file(path)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ModelError(f"{path}: not a published checkpoint: it has no `model` and `model_args`")
    if not isinstance(saved["model"], dict):
        raise ModelError(f"{path}: its `model` is no table of tensors")
    config = _model_config(saved["model_args"], path)
    tensors = {str(name).removeprefix(COMPILED_PREFIX): value for name, value in saved["model"].items()}
    if config.n_layer > len(tensors):
        raise ModelError(
            f"{path}: {len(tensors)} tensors are too few for the {config.n_layer} layers that it states"
        )
    params = params_from_tensors(tensors, config, place=str(path))
    best = float(np.asarray(saved.get("best_val_loss", float("inf"))))
    return Weights(config, params, Training(int(saved.get("iter_num", 0)), best))


def params_from_tensors(tensors: dict[str, np.ndarray], config: ModelConfig, *, place: str) -> dict[str, Any]:
    """Arrange tensors under their published names into the nested parameters of `GPT`.

    Raises:
        ModelError: a tensor is missing, left over or of another shape than `config` asks for.
    """
    remaining = dict(tensors)
    head = remaining.pop("lm_head.weight", None)
    params: dict[str, Any] = {}
    for name, entry in parameter_table(config).items():
        if name not in remaining:
            raise ModelError(f"{place}: tensor {name} is missing")
        value = np.asarray(remaining.pop(name))
        shape = entry.shape[::-1] if entry.transposed else entry.shape
        if value.shape != shape:
            raise ModelError(
                f"{place}: tensor {name} has shape {value.shape}; the configuration asks for {shape}"
            )
        value = np.ascontiguousarray(value.T if entry.transposed else value, np.float32)
        _place(params, entry.path, value.reshape(entry.held))
    if remaining:
        raise ModelError(f"{place}: tensors that no parameter takes: {', '.join(sorted(remaining)[:5])}")
    if head is not None and not np.array_equal(head, tensors["transformer.wte.weight"]):
        raise ModelError(f"{place}: its output layer is not its token embedding; only tied models are known")
    return params


class ParameterEntry(NamedTuple):
    """Where a published tensor lives in our parameters.

    Attributes:
        path: of the parameter.
        shape: of it in our files, a matrix or vector.
        transposed: whether the published tensor is its transpose.
        held: its shape in memory, of the same elements in the same order.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    held: tuple[int, ...]


def parameter_table(config: ModelConfig) -> dict[str, ParameterEntry]:
    """The published name of every parameter of a model."""
    D = config.n_embd
    table = {
        "transformer.wte.weight": ParameterEntry(
            ("wte", "embedding"), (config.vocab_size, D), transposed=False, held=(config.vocab_size, D)
        ),
        "transformer.wpe.weight": ParameterEntry(
            ("wpe", "embedding"), (config.block_size, D), transposed=False, held=(config.block_size, D)
        ),
    }

    def add(
        published: str, path: tuple[str, ...], shape: tuple[int, ...], held: tuple[int, ...] | None = None
    ) -> None:
        held = held or shape
        linear = len(shape) > 1
        table[f"{published}.weight"] = ParameterEntry(
            (*path, "kernel" if linear else "scale"), shape, linear, held
        )
        if config.bias:
            table[f"{published}.bias"] = ParameterEntry(
                (*path, "bias"), shape[-1:], transposed=False, held=held[1:] if linear else held
            )

    for layer in range(config.n_layer):
        published, ours = f"transformer.h.{layer}", f"h_{layer}"
        add(f"{published}.ln_1", (ours, "ln_1"), (D,))
        add(f"{published}.attn.c_attn", (ours, "attn", "c_attn"), (D, 3 * D), held=(D, 3, D))
        add(f"{published}.attn.c_proj", (ours, "attn", "c_proj"), (D, D))
        add(f"{published}.ln_2", (ours, "ln_2"), (D,))
        add(f"{published}.mlp.c_fc", (ours, "mlp", "c_fc"), (D, 4 * D))
        add(f"{published}.mlp.c_proj", (ours, "mlp", "c_proj"), (4 * D, D))
    add("transformer.ln_f", ("ln_f",), (D,))
    return table


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
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        missing = sorted(set(_SHAPE_KEYS) - set(model_args)) if isinstance(model_args, dict) else []
        reason = f"lacks {', '.join(missing)}" if missing else str(error)
        raise ModelError(f"{path}: its model_args cannot be used: {reason}") from None


def _place(params: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        params = params.setdefault(name, {})
    params[path[-1]] = value
