"""The cases of `recipe.py`: a base and what differs from it, one change at a time. Needs Python alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# 0.58 million parameters: the shape of the model in the package, smaller.
SHAPE: Mapping[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 96, "block_size": 1024}
BASE: Mapping[str, Any] = {
    **SHAPE,
    "optimizer": "muon",
    "learning_rate": 8e-3,
    "windows": "packed",
    "batch_size": 4,
    "weight_decay": 0.1,
    "beta2": 0.98,
    "dropout": 0.0,
    "lr_schedule": "wsd",
    "min_lr": 0.0,
}
# Shares of a run's steps.
WARMUP, DECAY = 0.05, 0.4
ADAMW = {"optimizer": "adamw", "learning_rate": 2e-3}
# Times that each token of the data is read where it repeats.
REPEATS = 8
DEEPER, WIDER = {"n_layer": 8, "n_embd": 68}, {"n_layer": 2, "n_embd": 136}
LARGER = {"n_layer": 4, "n_embd": 128}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: of the change.
        changes: settings that differ from the base.
        seed: of initialisation and order.
        decay: share of the steps over which the rate falls at the end.
        framework: `jax`, this package, or `torch`, its peer.
        seconds: whether it trains as long as the base does, not on as many tokens.
        repeats: how often it reads each token of its data, which are cut short for that; 1 reads all the data that
            there are at most once.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1
    decay: float = DECAY
    framework: str = "jax"
    seconds: bool = False
    repeats: int = 1

    @property
    def key(self) -> str:
        """What tells it from all others in the report."""
        parts = [self.name, f"seed {self.seed}"]
        parts += ["equal seconds"] if self.seconds else []
        parts += [self.framework] if self.framework != "jax" else []
        return ", ".join(parts)

    def settings(self, *, tokens: int, speed: float = 1.0) -> dict[str, Any]:
        """Settings of the run.

        Args:
            tokens: that the base reads.
            speed: tokens a second of this case over those of the base, where it is to train as long.
        """
        merged = {**BASE, **self.changes}
        steps = round(
            tokens * (speed if self.seconds else 1.0) / (merged["batch_size"] * merged["block_size"])
        )
        merged |= {"max_iters": steps, "warmup_iters": round(WARMUP * steps), "seed": self.seed}
        if merged["lr_schedule"] == "wsd":
            return merged | {"decay_iters": round(self.decay * steps)}
        return merged | {"lr_decay_iters": steps}


def cases() -> Iterator[Case]:
    """All of them, in the order in which they are run."""
    yield Case("base")
    for rate in (1e-3, 2e-3, 4e-3, 1.6e-2, 3.2e-2):
        yield Case(f"muon, rate {rate:g}", {"learning_rate": rate})
    yield Case("muon, rate 0.004", {"learning_rate": 4e-3}, seed=2)
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        yield Case(f"adamw, rate {rate:g}", {"optimizer": "adamw", "learning_rate": rate})
    yield Case("windows starts", {"windows": "starts"})
    yield from _steps()
    yield from _with_peer()
    for decay in (0.05, 0.4):
        yield Case(f"weight decay {decay:g}", {"weight_decay": decay})
    yield Case("decay to a tenth", {"min_lr": BASE["learning_rate"] / 10})
    yield Case("no decay, average 0.98", {"ema_decay": 0.98}, decay=0.0)
    for dropout in (0.0, 0.1):
        yield Case(f"data read {REPEATS} times, dropout {dropout:g}", {"dropout": dropout}, repeats=REPEATS)
    yield Case("adamw, rate 0.002", ADAMW, seconds=True)
    yield from _shapes()


def _steps() -> Iterator[Case]:
    """Tokens a step; the rate goes with the square root of the batch."""
    for rows in (2, 8):
        rate = round(BASE["learning_rate"] * (rows / BASE["batch_size"]) ** 0.5, 4)
        changes = {"batch_size": rows, "learning_rate": rate}
        yield Case(f"{rows * SHAPE['block_size']} tokens a step, rate {rate:.2g}", changes)
        yield Case(f"{rows * SHAPE['block_size']} tokens a step, rate {rate:.2g}", changes, seconds=True)


def _shapes() -> Iterator[Case]:
    """Of as many parameters, and of more, each trained as long as the base."""
    for name, shape in (("wider", WIDER), ("deeper", DEEPER), ("larger", LARGER)):
        yield Case(f"{name}: {shape['n_layer']} layers of {shape['n_embd']}", shape, seconds=True)


def _with_peer() -> Iterator[Case]:
    """The published way, here and in PyTorch, on the same batches from the same weights."""
    published = {**ADAMW, "windows": "starts", "lr_schedule": "cosine", "min_lr": ADAMW["learning_rate"] / 10}
    for framework in ("jax", "torch"):
        yield Case("as published", published, framework=framework)
