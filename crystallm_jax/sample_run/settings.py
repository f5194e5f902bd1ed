"""What the samples of a folder depend on, so that a run goes on only with what it was begun with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from crystallm_jax.api import CrystalModel
from crystallm_jax.sample_run.targets import ValidTarget
from crystallm_jax.sampling.prompts import Prompt
from crystallm_jax.sampling.requests import GenerationRequest

# Hexadecimal digits of a digest: enough to tell, few enough to read.
_DIGITS = 16


def settings_of(
    model: CrystalModel,
    prompts: Sequence[Prompt],
    request: GenerationRequest,
    *,
    target: ValidTarget | None,
    time_limit: float,
) -> dict[str, Any]:
    """All that the files of a run depend on, as JSON has it; batch size and devices are no part of it."""
    asked = asdict(request)
    del asked["batch_size"], asked["tensor"]
    return json.loads(
        json.dumps(
            {
                "weights": _digest_of_weights(model.params),
                "model_config": asdict(model.config),
                "prompts": _digest(json.dumps(list(prompts)).encode()),
                **asked.pop("method"),
                **asked,
                "target_valid": target and target.valid,
                "limit_samples": target and target.limit,
                "time_limit": time_limit,
            }
        )
    )


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two settings, as `NAME=THEN, now NAME=NOW`; None where nothing does."""
    for name in dict.fromkeys([*now, *before]):
        then, this = before.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(this, dict):
            inner = difference(then, this)
            if inner is not None:
                return inner
        elif then != this:
            return f"{name}={then}, now {name}={this}"
    return None


def _digest_of_weights(params: Any) -> str:
    digest = hashlib.blake2b()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:_DIGITS]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()[:_DIGITS]
