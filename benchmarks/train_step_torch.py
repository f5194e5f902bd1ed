"""One case of `train_step.py` in PyTorch: `transformers`' GPT-2 of the same shape; started by it, a process a case.

    python benchmarks/train_step_torch.py '{"case": {...}, "micro_batches": 4, "seconds": 3, "runs": 3}'

As a good user trains it: `torch.compile`, SDPA attention, autocast, fused AdamW, gradients summed over micro-batches
and clipped, the loss fetched a step late. It differs from our model in its biases, which GPT-2 always has.
"""

import json
import resource
import sys
import time
from typing import Any

import torch
import transformers
from torch.nn import functional
from train_step_cases import MODELS, VOCAB_SIZE, Case
from transformers.integrations.sdpa_attention import sdpa_attention_forward

HOST_BATCHES = 4
CAUSAL_SDPA = "causal_sdpa"


def build(case: Case, device: str) -> torch.nn.Module:
    """GPT-2 of a case's shape, ready to train."""
    shape = MODELS[case.model]
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        resid_pdrop=case.dropout,
        embd_pdrop=case.dropout,
        attn_pdrop=case.attention_dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    # While compiling, transformers' own `sdpa` builds a mask, which keeps PyTorch from its flash kernel (torch below
    # 2.14). An implementation that it has no mask for gets none, and SDPA's `is_causal` instead.
    transformers.AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)
    config._attn_implementation = CAUSAL_SDPA
    return transformers.GPT2LMHeadModel(config).to(device).train()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as published: matrices of linear layers decay."""
    kernels = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    chosen = {id(p) for p in kernels}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)


def measure(case: Case, *, micro_batches: int, seconds: float, runs: int) -> dict[str, Any]:
    """Rates of the runs, compile time, memory."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(case, device)
    optimizer = make_optimizer(model)
    T = MODELS[case.model]["block_size"]
    host = [
        torch.randint(0, VOCAB_SIZE, (micro_batches, case.batch_size, T + 1)) for _ in range(HOST_BATCHES)
    ]
    if device == "cuda":
        host = [batch.pin_memory() for batch in host]

    @torch.compile
    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1]).logits
        return functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE).float(), tokens[:, 1:].reshape(-1))

    def train(batch: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for micro_batch in batch:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
                loss = loss_of(micro_batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / micro_batches

    def run(least_s: float, least_steps: int) -> float:
        batch, pending, count = host[0].to(device, non_blocking=True), None, 0
        begun = time.perf_counter()
        while count < least_steps or time.perf_counter() - begun < least_s:
            loss = train(batch)
            count += 1
            batch = host[count % HOST_BATCHES].to(device, non_blocking=True)
            if pending is not None:
                pending.item()
            pending = loss
        if pending is None or not torch.isfinite(pending):
            raise FloatingPointError("the loss is not finite")
        return count * micro_batches * case.batch_size * T / (time.perf_counter() - begun)

    begun = time.perf_counter()
    run(0.0, 1)
    compile_s = time.perf_counter() - begun
    run(0.0, 2)
    rates = [run(seconds, 3) for _ in range(runs)]
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": rates,
        "compile_s": compile_s,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else process,
        "process_memory_bytes": process,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> int:
    """Measure the case of the one argument and print the result."""
    job = json.loads(sys.argv[1])
    print(
        json.dumps(
            measure(
                Case(**job["case"]),
                micro_batches=job["micro_batches"],
                seconds=job["seconds"],
                runs=job["runs"],
            )
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
