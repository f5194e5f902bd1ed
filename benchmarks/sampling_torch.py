"""One case of `sampling.py` in PyTorch, in `transformers`' way or in the published; started by it, a process a case.

    python benchmarks/sampling_torch.py '{"case": {...}, "waves": 4, "seconds": 30, "runs": 3}'

`transformers`: GPT-2 of the same shape and `generate`, cached and batched. Rows of unlike length go a batch at a time,
in order, each batch to the end of its longest row; only the tokens that were asked for count.

`published`: one structure at a time, and for each token the whole text again, cropped to the context; SDPA attention,
the head applied to the last position alone. Not compiled, as the published tool also offers.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import torch
import transformers
from sampling_cases import MODELS, VOCAB_SIZE, Case, prompts_of

TOP_K = 10
WARM_UP_TOKENS = 16


def build(case: Case, device: str) -> transformers.GPT2LMHeadModel:
    """GPT-2 of a case's shape, ready to sample. It differs from our model in its biases, which GPT-2 always has."""
    shape = MODELS[case.model]
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config).to(device, getattr(torch, case.dtype)).eval()


def batched(model: transformers.GPT2LMHeadModel, prompts: torch.Tensor, count: int) -> int:
    """Add so many tokens to each prompt [B, T]; returns how many each got."""
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=TOP_K,
        temperature=1.0,
        max_new_tokens=count,
        min_new_tokens=None,
        use_cache=True,
    )
    return written.shape[1] - prompts.shape[1]


def one_by_one(model: transformers.GPT2LMHeadModel, prompts: torch.Tensor, count: int) -> int:
    """The same without a cache, one prompt after the other, and a look at each token on the host."""
    block_size = model.config.n_positions
    for prompt in prompts:
        text = prompt[None]
        for _ in range(count):
            logits = model(text[:, -block_size:], use_cache=False, logits_to_keep=1).logits[:, -1].float()
            kth = torch.topk(logits, TOP_K).values[:, -1:]
            probabilities = torch.softmax(logits.masked_fill(logits < kth, -torch.inf), dim=-1)
            token = torch.multinomial(probabilities, num_samples=1)
            text = torch.cat((text, token), dim=1)
            # The published loop looks here whether the text is over.
            token.item()
    return count


@torch.no_grad()
def measure(case: Case, *, waves: int, seconds: float, runs: int) -> dict[str, Any]:
    """Rates of the runs and memory."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build(case, device)
    limits = case.limits(waves)
    prompts = torch.tensor(prompts_of(len(limits)), device=device)
    way = batched if case.framework == "transformers" else one_by_one
    batches = [slice(first, first + case.batch_size) for first in range(0, len(limits), case.batch_size)]

    def run() -> float:
        begun = time.perf_counter()
        for batch in batches:
            if way(model, prompts[batch], max(limits[batch])) != max(limits[batch]):
                raise AssertionError("rows did not get the tokens that were asked of them")
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    begun = time.perf_counter()
    way(model, prompts[batches[0]], WARM_UP_TOKENS)
    warm_up = time.perf_counter() - begun
    spent: list[float] = []
    while len(spent) < runs and sum(spent) < seconds:
        spent.append(run())
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": [sum(limits) / one for one in spent],
        "rows": len(limits),
        "compile_s": warm_up,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else process,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> int:
    """Measure the case of the one argument and print the result."""
    job = json.loads(sys.argv[1])
    result = measure(Case(**job["case"]), waves=job["waves"], seconds=job["seconds"], runs=job["runs"])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
