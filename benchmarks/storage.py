"""What each storage type of `.npz` files costs and loses, and how fast NumPy samples beside JAX, in one run.

    python benchmarks/storage.py [--model default] [--dataset DIR --split val] [--records 200] [--rounds 3]

Losses are against the model as it was loaded, on held-out crystals, each read from its beginning: nats a token, logits,
KL divergence, and the share of places where the most likely token is the same. `equal` is the share of samples that are
the same, token by token, as those of float32 with the same seed; `valid` the share that the validator passes. Tokens a
second are medians over rounds, in turns, of generated tokens; a first run of JAX, which compiles, does not count.
A model that was itself kept in float16 loses nothing in float16: its card says so.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from sampling_trained import COMPOSITIONS
from train_step import listed, write

from crystallm_jax.api import CrystalModel, load_model
from crystallm_jax.cif import CIFTokenizer, make_prompt, preprocess_cif, stream_text
from crystallm_jax.data.corpus import EMBEDDED, read_corpus
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import CrystallmError
from crystallm_jax.models.npz import Storage
from crystallm_jax.numpy_model import NumpyModel, load_numpy, save_numpy
from crystallm_jax.samples import Sample
from crystallm_jax.sampling.devices import use_all_cores

# Texts of like length that are read together.
_TOGETHER = 8


@dataclass
class Loss:
    """Sums over the places of texts, and the largest difference of a logit."""

    places: int = 0
    nats: float = 0.0
    reference_nats: float = 0.0
    logits: int = 0
    difference: float = 0.0
    largest_difference: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0

    def add(self, ours: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> None:
        """Count places: logits [N, V] of both and the tokens that follow, int [N]."""
        ours, reference = ours.astype(np.float64), reference.astype(np.float64)
        log_p, log_q = log_softmax(ours), log_softmax(reference)
        rows = np.arange(len(targets))
        self.places += len(targets)
        self.nats -= log_p[rows, targets].sum()
        self.reference_nats -= log_q[rows, targets].sum()
        difference = np.abs(ours - reference)
        self.logits += difference.size
        self.difference += difference.sum()
        self.largest_difference = max(self.largest_difference, float(difference.max()))
        self.divergence += (np.exp(log_q) * (log_q - log_p)).sum()
        self.agreeing += int((ours.argmax(-1) == reference.argmax(-1)).sum())

    def report(self) -> dict[str, float]:
        """The means."""
        return {
            "loss": self.nats / self.places,
            "loss_added": (self.nats - self.reference_nats) / self.places,
            "largest_difference": self.largest_difference,
            "mean_difference": self.difference / self.logits,
            "divergence": self.divergence / self.places,
            "same_greedy": self.agreeing / self.places,
            "places": self.places,
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [N, V]."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def held_out(dataset: Path | None, split: str, *, records: int, block_size: int) -> list[np.ndarray]:
    """Texts that fit the context, evenly spaced over a prepared folder or over the embedded corpus."""
    if dataset is not None:
        store = TokenStore.open(dataset, split)
        found = [store.record(i) for i in _spaced(len(store), records)]
    else:
        corpus, tokenizer = list(read_corpus()), CIFTokenizer()
        chosen = [corpus[i].text for i in _spaced(len(corpus), records)]
        found = [tokenizer.encode_cif(stream_text(preprocess_cif(text))) for text in chosen]
    return sorted((text for text in found if 2 <= len(text) <= block_size), key=len)


def _spaced(count: int, wanted: int) -> Iterator[int]:
    """So many of the first whole numbers, or all of them."""
    wanted = min(count, wanted)
    return (i * count // wanted for i in range(wanted))


def losses(
    models: dict[str, NumpyModel], reference: NumpyModel, texts: Sequence[np.ndarray]
) -> dict[str, Loss]:
    """What each model loses on texts sorted by length."""
    found = {name: Loss() for name in models}
    for begin in range(0, len(texts), _TOGETHER):
        part = texts[begin : begin + _TOGETHER]
        tokens = np.zeros((len(part), len(part[-1])), np.int32)
        inside = np.arange(len(part[-1])) < np.array([[len(text)] for text in part])
        tokens[inside] = np.concatenate(part)
        counted, targets = inside[:, 1:], tokens[:, 1:][inside[:, 1:]]
        expected = reference.logits(tokens)[:, :-1][counted]
        for name, model in models.items():
            found[name].add(model.logits(tokens)[:, :-1][counted], expected, targets)
    return found


def sampled(models: dict[str, NumpyModel], prompts: Sequence[str], each: int) -> dict[str, dict[str, float]]:
    """Samples of each model with the same seed: which are valid, and which are those of the first model."""
    first: list[Sample] = []
    found = {}
    for name, model in models.items():
        samples = model.generate(prompts, each, seed=0)
        first = first or samples
        same = sum(one.token_ids == other.token_ids for one, other in zip(samples, first, strict=True))
        valid = sum(sample.validate().valid for sample in samples)
        found[name] = {"equal": same / len(samples), "valid": valid / len(samples), "samples": len(samples)}
    return found


def speeds(
    ours: NumpyModel, theirs: CrystalModel, prompts: Sequence[str], *, batch_sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Tokens a second of both by batch size, each batch filled once."""
    rows = []
    for batch_size in batch_sizes:
        texts = [prompts[i % len(prompts)] for i in range(batch_size)]
        runs: dict[str, list[float]] = {"numpy": [], "jax": []}
        _rate(theirs, texts, 0)
        same = total = 0
        for seed in range(rounds):
            samples = {}
            for name, model in (("numpy", ours), ("jax", theirs)):
                rate, samples[name] = _rate(model, texts, seed)
                runs[name].append(rate)
            pairs = zip(samples["numpy"], samples["jax"], strict=True)
            same += sum(one.token_ids == other.token_ids for one, other in pairs)
            total += batch_size
        medians = {f"{name}_tokens_per_s": statistics.median(rates) for name, rates in runs.items()}
        rows.append(
            {"batch_size": batch_size, **medians, "runs": runs, "equal": same, "samples": total}
            | {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
        )
    return rows


def _rate(model: NumpyModel | CrystalModel, prompts: Sequence[str], seed: int) -> tuple[float, list[Sample]]:
    begun = time.perf_counter()
    samples = model.generate(prompts, seed=seed, batch_size=len(prompts))
    seconds = time.perf_counter() - begun
    given = [len(model.tokenizer.encode_cif(prompt)) for prompt in prompts]
    return sum(len(one.token_ids) - given[one.prompt_index] for one in samples) / seconds, samples


def sizes(path: Path) -> dict[str, float]:
    """Bytes of a file, and what compressing its members would make of it, with the seconds it takes."""
    packed = path.with_suffix(".zip")
    begun = time.perf_counter()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    seconds = time.perf_counter() - begun
    return {
        "bytes": path.stat().st_size,
        "compressed_bytes": packed.stat().st_size,
        "compress_s": seconds,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="name, folder or checkpoint (%(default)s)")
    parser.add_argument("--dataset", type=Path, help="a prepared folder (the embedded corpus)")
    parser.add_argument("--split", default="val", help="of the folder (%(default)s)")
    parser.add_argument("--records", type=int, default=200, help="crystals to read (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=4, help="of 16 compositions each; 0 for none")
    parser.add_argument("--batch-sizes", type=listed(int), default=(1, 8, 64), help="by commas (1,8,64)")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_storage.json"), help="JSON")
    return parser.parse_args()


def measure(options: argparse.Namespace, theirs: CrystalModel, folder: Path) -> dict[str, Any]:
    """Everything that the report holds of the model."""
    models, rows = {}, []
    for dtype in get_args(Storage):
        path = folder / f"{dtype}.npz"
        save_numpy(theirs, path, dtype=dtype)
        begun = time.perf_counter()
        models[dtype] = load_numpy(path)
        load_s = time.perf_counter() - begun
        rows.append({"storage": dtype, "load_s": load_s, **sizes(path)})
    reference = models["float32"]
    texts = held_out(
        options.dataset, options.split, records=options.records, block_size=theirs.config.block_size
    )
    prompts = [make_prompt(composition) for composition in COMPOSITIONS]
    found = losses(models, reference, texts)
    samples = sampled(models, prompts, options.num_samples) if options.num_samples else {}
    for row in rows:
        row.update(found[row["storage"]].report() | samples.get(row["storage"], {}))
    return {
        "texts": len(texts),
        "rows": rows,
        "speeds": speeds(reference, theirs, prompts, batch_sizes=options.batch_sizes, rounds=options.rounds),
    }


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    head = "storage      MB  deflated  loss     added     KL        max |Δ|   mean |Δ|  same greedy  equal  valid"
    lines = [head]
    for row in found["rows"]:
        share = f"{row['equal']:6.0%} {row['valid']:6.0%}" if "equal" in row else ""
        lines.append(
            f"{row['storage']:9}{row['bytes'] / 1e6:6.1f} {row['compressed_bytes'] / 1e6:9.1f}  {row['loss']:.5f}"
            f"  {row['loss_added']:+.5f}  {row['divergence']:.2e}  {row['largest_difference']:.2e}"
            f"  {row['mean_difference']:.2e}  {row['same_greedy']:11.3%} {share}"
        )
    lines.append("\nbatch  NumPy tokens/s  JAX tokens/s  equal samples")
    lines += [
        f"{row['batch_size']:5} {row['numpy_tokens_per_s']:15,.0f} {row['jax_tokens_per_s']:13,.0f}"
        f"  {row['equal']} of {row['samples']}"
        for row in found["speeds"]
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print a table and write JSON."""
    options = parse()
    use_all_cores(max(options.batch_sizes))
    try:
        theirs = load_model(options.model)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, theirs, Path(folder))
    except CrystallmError as error:
        print(f"benchmarks/storage.py: {error}", file=sys.stderr)
        return 1
    source = f"{options.split} of a prepared folder" if options.dataset else f"the {EMBEDDED} corpus"
    parameters = f"{theirs.name}, {theirs.num_params:,} parameters"
    print(f"{os.cpu_count()} cores; {parameters}; {found['texts']} crystals of {source}\n{table(found)}")
    report = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "pymatgen")},
        "model": theirs.name,
        "parameters": theirs.num_params,
        "config": asdict(theirs.config),
        "texts_from": source,
        "settings": {
            name: getattr(options, name) for name in ("records", "num_samples", "batch_sizes", "rounds")
        },
        **found,
    }
    write(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
