"""The state of the published optimiser, torch's AdamW, both ways.

It numbers the parameters: `param_groups` lists the numbers of those that decay, then of the others, each sorted by
name; `state` holds under each number the updates made and the two moments, in the shapes of the published weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.model import Moments
from crystallm_jax.models.parameters import params_from_tensors, published_arrays
from crystallm_jax.models.published_names import optimizer_order
from crystallm_jax.models.torch_file import StoredTensor

# Counts of updates are kept as int32.
LARGEST_COUNT = 2**31 - 1
_FIRST, _SECOND = "exp_avg", "exp_avg_sq"
_KEYS = {"step", _FIRST, _SECOND}
# As published; settings say the others.
ADAM_EPSILON = 1e-8


def read_moments(optimizer: Any, config: ModelConfig, *, place: str) -> Moments | None:
    """The moments in a saved optimiser; None where it has made no update yet.

    Args:
        optimizer: what `torch.optim.AdamW.state_dict` gave, tensors as `StoredTensor`.
        config: the shape of the model.
        place: the file, for messages.

    Raises:
        ModelError: it is the state of another optimiser or of other parameters, or not finite.
    """
    if optimizer in (None, {}):
        return None
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise ModelError(f"{place}: its optimiser has no table `state`; read its weights alone")
    state = optimizer["state"]
    if not state:
        return None
    numbers = _numbers(optimizer.get("param_groups"), config, place)
    order = optimizer_order(config)
    entries = {}
    for name, number in zip(order.decayed + order.others, numbers, strict=True):
        entry = state.get(number)
        if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
            lacking = sorted(_KEYS - entry.keys()) if isinstance(entry, dict) else sorted(_KEYS)
            raise ModelError(
                f"{place}: its optimiser is no AdamW: of {name} it lacks {', '.join(lacking)}; read its weights alone"
            )
        if extra := sorted(str(key) for key in entry.keys() - _KEYS):
            raise ModelError(f"{place}: its optimiser is no plain AdamW: of {name} it keeps {extra[0]}")
        entries[name] = entry
    if len(state) > len(entries):
        raise ModelError(f"{place}: its optimiser holds {len(state)} parameters, the model {len(entries)}")
    updates = {
        name: read_count(entry["step"], f"{place}: the optimiser's step of {name}")
        for name, entry in entries.items()
    }
    made = updates[order.decayed[0]]
    for name, count in updates.items():
        if count != made:
            raise ModelError(f"{place}: its optimiser updated {name} {count} times, others {made} times")
    first, second = (
        params_from_tensors(
            {name: entry[key] for name, entry in entries.items()},
            config,
            place=place,
            role=f"the optimiser's {key} of",
        )
        for key in (_FIRST, _SECOND)
    )
    return Moments(made, first, second)


def optimizer_state(
    moments: Moments | None, config: ModelConfig, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What `torch.optim.AdamW.load_state_dict` takes; without moments, as before the first update.

    Args:
        moments: of the parameters.
        config: the shape of the model.
        settings: with `learning_rate`, `beta1`, `beta2` and `weight_decay`.
    """
    order = optimizer_order(config)
    numbers = {name: number for number, name in enumerate(order.decayed + order.others)}
    state: dict[int, Any] = {}
    if moments is not None:
        first, second = (dict(published_arrays(tree, config)) for tree in (moments.first, moments.second))
        state = {
            number: {
                "step": np.array(moments.updates, np.float32),
                _FIRST: first[name],
                _SECOND: second[name],
            }
            for name, number in numbers.items()
        }
    groups = [
        {
            "weight_decay": float(decay),
            "lr": float(settings["learning_rate"]),
            "betas": (float(settings["beta1"]), float(settings["beta2"])),
            "eps": ADAM_EPSILON,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "params": [numbers[name] for name in names],
        }
        for names, decay in ((order.decayed, settings["weight_decay"]), (order.others, 0.0))
    ]
    return {"state": state, "param_groups": groups}


def read_count(value: Any, what: str) -> int:
    """A count, saved as a number or as a tensor of one.

    Raises:
        ModelError: it is none.
    """
    found = value.read() if isinstance(value, StoredTensor) and value.nbytes < LARGEST_COUNT else value
    if isinstance(found, np.ndarray):
        found = found.item() if found.size == 1 else None
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if type(found) is not int or not 0 <= found <= LARGEST_COUNT:
        raise ModelError(f"{what} is no count from 0 to {LARGEST_COUNT}: get another copy")
    return found


def _numbers(groups: Any, config: ModelConfig, place: str) -> list[Any]:
    """The numbers of the parameters in the published order."""
    order = optimizer_order(config)
    expected = (len(order.decayed), len(order.others))
    groups = groups if isinstance(groups, list) else []
    params = [group.get("params") if isinstance(group, dict) else None for group in groups]
    listed = [numbers if isinstance(numbers, list) else [] for numbers in params]
    found = tuple(len(numbers) for numbers in listed)
    if found != expected:
        raise ModelError(
            f"{place}: its optimiser has groups of {' and '.join(map(str, found)) or 'no'} parameters, where"
            f" {expected[0]} decay and {expected[1]} do not; read its weights alone"
        )
    numbers = [number for group in listed for number in group]
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        raise ModelError(f"{place}: its optimiser does not number its parameters; read its weights alone")
    return numbers
