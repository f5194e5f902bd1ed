"""What is checked on an accelerator before it trains: golden parity in float32, and its fused attention.

Each check ends in a dict for the report, whose `passed` is None where it was left out, with a `reason` then. A check
that fails, or breaks, does not keep the others from running, nor the training.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_shipment import GOLDEN_MODELS, GREEDY_FILE, Shipment

from crystallm_jax.data.packing import Batch
from crystallm_jax.data.rows import open_rows
from crystallm_jax.model import GPT, ModelConfig, init_params
from crystallm_jax.model.attention import Backend, choose_backend
from crystallm_jax.model.transformer import INIT_STD
from crystallm_jax.models import Model, read_published
from crystallm_jax.training.step import batch_loss

Result = dict[str, Any]

# Of the published logits.
MOST_LOGITS_DIFFERENCE = 1e-5
# Two attentions in bfloat16 on a CPU differ by 4e-6 of the loss and 0.002 of a gradient; where one of them sees other
# records too, by 0.001 and 0.3.
MOST_LOSS_DIFFERENCE, MOST_GRADIENT_DIFFERENCE = 1e-3, 0.05
# Of the model that the attentions are compared in.
LAYERS, ROWS = 2, 8


def run_checks(shipment: Shipment) -> dict[str, Result]:
    """All checks by name."""
    return {
        "golden": _recorded(lambda: golden_parity(shipment.golden)),
        "attention": _recorded(lambda: fused_attention(shipment)),
    }


def failed(checks: dict[str, Result]) -> list[str]:
    """The names of the checks that did not pass."""
    return [name for name, result in checks.items() if result["passed"] is False]


def _recorded(check: Callable[[], Result]) -> Result:
    begun = time.monotonic()
    try:
        result = check()
    except Exception as error:  # noqa: BLE001  it is in the report, and the exit code tells
        result = {"passed": False, "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {**result, "seconds": round(time.monotonic() - begun, 1)}


def golden_parity(golden: Path | None) -> Result:
    """Logits of the published code's recorded checkpoints in float32, and its greedy tokens."""
    if golden is None:
        return {"passed": None, "reason": "the shipment has no golden files: pack it with --golden"}
    differences: dict[str, float] = {}
    greedy: dict[str, int] = {}
    with jax.default_matmul_precision("highest"):
        for name in GOLDEN_MODELS:
            weights = read_published(golden / "model" / name / "ckpt.pt")
            forward = jax.jit(partial(_logits, weights.config))
            with np.load(golden / "model" / name / "logits.npz", allow_pickle=False) as recorded:
                logits = forward(weights.params, jnp.asarray(recorded["input_ids"], jnp.int32))
                differences[name] = float(np.abs(np.asarray(logits) - recorded["logits"]).max())
            if not greedy:
                with np.load(golden / GREEDY_FILE, allow_pickle=False) as recorded:
                    expected = recorded["greedy_ids"].tolist()
                    found = _greedy(weights, recorded["prompt_ids"].tolist(), len(expected), forward=forward)
                greedy = {
                    "tokens": len(expected),
                    "equal": sum(a == b for a, b in zip(found, expected, strict=True)),
                }
    passed = max(differences.values()) <= MOST_LOGITS_DIFFERENCE and greedy["equal"] == greedy["tokens"]
    return {"passed": passed, "greatest_difference": differences, "greedy": greedy}


def _logits(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return GPT(config).apply({"params": params}, tokens)


def _greedy(
    weights: Model, prompt: list[int], length: int, *, forward: Callable[..., jax.Array]
) -> list[int]:
    """A prompt and the likeliest tokens after it, `length` in all; the last of a context are seen, where it is full."""
    T = weights.config.block_size
    tokens = list(prompt)
    while len(tokens) < length:
        window = tokens[-T:]
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(window)] = window
        tokens.append(int(forward(weights.params, padded)[0, len(window) - 1].argmax()))
    return tokens


def fused_attention(shipment: Shipment) -> Result:
    """Loss and gradients of a small model of the run's width through the device's fused attention and the plain one."""
    config = shipment.config.model_config(shipment.store.header.vocab_size)
    chosen = choose_backend(
        "auto",
        dtype=config.dtype,
        dropout_rate=config.attention_dropout_rate,
        tokens=config.block_size,
        head_dim=config.head_dim,
        segmented=shipment.config.windows == "packed",
    )
    if chosen not in ("cudnn", "splash"):
        device = jax.devices()[0].device_kind
        return {
            "passed": None,
            "reason": f"no fused attention for {config.dtype} on {device}: {chosen} is taken",
        }
    rows = open_rows(
        shipment.val_store,
        block_size=config.block_size,
        windows=shipment.config.windows,
        seed=shipment.config.seed,
    )
    # The first rows hold one long record each, where there is nothing to be blind to.
    numbers = np.random.default_rng(0).permutation(len(rows))[:ROWS]
    return compare_attention(config, rows.read(numbers), chosen, "xla")


def compare_attention(config: ModelConfig, batch: Batch, fused: Backend, plain: Backend) -> Result:
    """What a training step takes from a batch, its loss and gradients, through two implementations of attention.

    `gradient_difference` is the greatest over the parameters of the distance of both gradients, by the norm of the
    plain one: norms alone would hardly move where attention saw other tokens.

    Args:
        config: of the model; its first layers alone are taken, without dropout.
        batch: rows [B, ...].
        fused: the one.
        plain: the other.
    """
    small = replace(
        config, n_layer=LAYERS, dropout=0.0, attention_dropout=0.0, layers="unrolled", remat="none"
    )
    params = _random_params(small)
    losses, gradients = {}, {}
    for backend in (fused, plain):
        loss = partial(batch_loss, replace(small, attention=backend))
        losses[backend], gradients[backend] = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))
    norms = {name: float(_norm(jax.tree.leaves(tree))) for name, tree in gradients.items()}
    distances = jax.tree.map(
        lambda ours, theirs: _norm([ours - theirs]) / max(_norm([theirs]), np.finfo(np.float32).tiny),
        gradients[fused],
        gradients[plain],
    )
    loss_difference = abs(float(losses[fused]) / float(losses[plain]) - 1)
    gradient_difference = float(np.max(jax.tree.leaves(distances)))  # NaN, where one is
    passed = loss_difference <= MOST_LOSS_DIFFERENCE and gradient_difference <= MOST_GRADIENT_DIFFERENCE
    return {
        "passed": bool(passed),
        "loss": {name: float(value) for name, value in losses.items()},
        "gradient_norm": norms,
        "loss_difference": loss_difference,
        "gradient_difference": gradient_difference,
    }


def _random_params(config: ModelConfig) -> Any:
    """Parameters of the usual size; initialising them compiles more than it computes."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def made(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """A kernel or an embedding, or the scale of a LayerNorm."""
        values = rng.normal(0, INIT_STD, leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape)
        return values.astype(np.float32)

    return jax.tree.map(made, shapes)


def _norm(leaves: list[np.ndarray]) -> np.floating[Any]:
    return np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in leaves))
