"""The peer's run of `recipe.py`: `transformers`' GPT-2 trained in PyTorch; started by it, a process a run.

    python benchmarks/recipe_torch.py '{"settings": {...}, "dataset": DIR, "val_dataset": DIR, "out_dir": DIR}'

It begins from the weights that our run begins from and reads the batches that it reads. The step, the optimiser and
the evaluation, a file at a time, are PyTorch's. Biases, which GPT-2 has and ours has not, stay at zero. Prints one line
of JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from recipe_jax import FILES, train_config
from torch.nn import functional

from crystallm_jax.data.feed import open_feed
from crystallm_jax.data.store import TokenStore
from crystallm_jax.model import init_params
from crystallm_jax.models.huggingface import write_huggingface
from crystallm_jax.models.model import Model
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.optimizer import learning_rate_schedule


def begun_as_ours(config: TrainConfig, folder: Path) -> torch.nn.Module:
    """GPT-2 with the weights of our run before its first step."""
    model_config = config.model_config(371)
    params = jax.device_get(init_params(model_config, jax.random.key(config.seed)))
    if not folder.exists():
        write_huggingface(folder, Model(model_config, params), card="")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.endswith(".bias")
    return model.train()


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as published: matrices of linear layers decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kernels = [p for name, p in trained.items() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in trained.items() if not (p.ndim == 2 and ".h." in name)]
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8)


def batches(config: TrainConfig) -> Iterator[torch.Tensor]:
    """What our run reads, int64 [B, T + 1], endlessly."""
    feed = open_feed(
        TokenStore.open(config.dataset),
        block_size=config.block_size,
        windows="starts",
        batch_size=config.batch_size,
        micro_batches=1,
        seed=config.seed,
    )
    try:
        for batch in feed:
            yield torch.from_numpy(batch.tokens[0].astype(np.int64))
    finally:
        feed.close()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of tokens [B, T + 1]."""
    logits = model(tokens[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def loss_of_files(model: torch.nn.Module, store: TokenStore, block_size: int) -> float:
    """Nats a token over the files that we evaluate on, each alone."""
    total, counted = 0.0, 0
    for number in range(min(FILES, len(store))):
        tokens = torch.from_numpy(store.record(number)[: block_size + 1].astype(np.int64))[None]
        total += loss_of(model, tokens, "sum").item()
        counted += tokens.shape[1] - 1
    return total / counted


def main() -> int:
    """Train the case of the one argument and print its losses."""
    job = json.loads(sys.argv[1])
    if job.get("core") is not None:
        os.sched_setaffinity(0, {job["core"]})
        torch.set_num_threads(1)
    config = train_config(job["settings"], dataset=job["dataset"])
    if config.windows != "starts" or config.optimizer != "adamw":
        raise SystemExit("the peer trains with AdamW on windows that begin at CIF starts alone")
    model = begun_as_ours(config, Path(job["out_dir"]) / "begun_from")
    optimizer, rate = make_optimizer(model, config), learning_rate_schedule(config)
    losses: list[Any] = []
    for step, tokens in zip(range(config.max_iters), batches(config), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        losses.append([step + 1, loss.item()])
    val_store = TokenStore.open(job["val_dataset"], "val")
    found = {
        "val_loss": loss_of_files(model.eval(), val_store, config.block_size),
        "steps": config.max_iters,
        "tokens": config.max_iters * config.tokens_per_step,
        "train_losses": losses,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
