"""A model as a folder: `model.safetensors`, `config.yaml` and `MODEL_CARD.md`.

Parameters lie under their paths joined by dots (`h_0.attn.c_attn.kernel`), in float32 or, to halve the size, float16.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from crystallm_jax.config import load_config, to_yaml
from crystallm_jax.convert.published import parameter_table
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
CARD_FILE = "MODEL_CARD.md"


def read_folder(path: str | Path) -> Weights:
    """Read a model folder; every tensor is checked by name and shape.

    Raises:
        ModelError: a file is missing or damaged, or a tensor is missing, left over or of another shape.
    """
    path = Path(path)
    config = load_config(ModelConfig, path / CONFIG_FILE)
    weights = path / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except FileNotFoundError:
        raise ModelError(f"{weights}: no such file; a model folder holds it beside {CONFIG_FILE}") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{weights}: not a safetensors file, or a damaged one: {error}") from None
    params: dict[str, Any] = {}
    for entry in parameter_table(config).values():
        name = ".".join(entry.path)
        if name not in tensors:
            raise ModelError(f"{weights}: tensor {name} is missing")
        value = tensors.pop(name)
        if value.shape != entry.shape:
            raise ModelError(
                f"{weights}: tensor {name} has shape {value.shape}; {CONFIG_FILE} asks for {entry.shape}"
            )
        place = params
        for part in entry.path[:-1]:
            place = place.setdefault(part, {})
        place[entry.path[-1]] = value.astype(np.float32).reshape(entry.held)
    if tensors:
        raise ModelError(f"{weights}: tensors that no parameter takes: {', '.join(sorted(tensors)[:5])}")
    return Weights(config, params)


def write_folder(
    path: str | Path, config: ModelConfig, params: dict[str, Any], *, card: str, dtype: str = "float32"
) -> None:
    """Write a model folder; each file appears under its name when it is complete.

    Args:
        path: the folder, made if need be.
        config: the model's shape.
        params: nested parameters.
        card: text of `MODEL_CARD.md`: data, licence, how it was trained, metrics.
        dtype: storage of the tensors, `float32` or `float16`.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for entry in parameter_table(config).values():
        value = params
        for part in entry.path:
            value = value[part]
        tensors[".".join(entry.path)] = np.ascontiguousarray(np.asarray(value), dtype).reshape(entry.shape)
    partial = path / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, partial)
    partial.replace(path / WEIGHTS_FILE)
    for name, text in ((CONFIG_FILE, to_yaml(config)), (CARD_FILE, card)):
        partial = path / f"{name}.partial"
        partial.write_text(text)
        partial.replace(path / name)
