"""Speed of the feed beside plain implementations, on the same tokens in one run.

    python benchmarks/feed.py DIR [--block-size 1024] [--batch-size 32] [--micro-batches 1] [--out FILE]

DIR is a prepared folder. Windows are compared with the published way: random starts, and for each row a slice of the
memory map, cast to int64 and stacked. Packed rows are compared with a loop over rows and records that fills lists
and masks, over the same packing. Where the folder marks under-represented records, a mixture is measured too.
Tokens are those of whole rows, padding included, from a file that has been read before.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.data.feed import open_feed
from crystallm_jax.data.packing import pack
from crystallm_jax.data.rows import PackedRows, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import DataError

Take = Callable[[], object]


def plain_windows(store: TokenStore, settings: argparse.Namespace, windows: str) -> Take:
    """A step of windows, read as the published training script does."""
    length, size = settings.block_size + 1, settings.batch_size
    last = len(store.tokens) - length
    starts = np.asarray(store.starts)
    starts = starts[starts <= last]
    rng = np.random.default_rng(0)

    def micro_batch() -> tuple[np.ndarray, np.ndarray]:
        anywhere = rng.integers(0, last + 1, size)
        begins = starts[rng.permutation(len(starts))[:size]] if windows == "starts" else anywhere
        x = np.stack([store.tokens[i : i + length - 1].astype(np.int64) for i in begins])
        y = np.stack([store.tokens[i + 1 : i + length].astype(np.int64) for i in begins])
        return x, y

    return lambda: [micro_batch() for _ in range(settings.micro_batches)]


def plain_packed(store: TokenStore, settings: argparse.Namespace) -> Take:
    """A step of packed rows, put together record by record."""
    length = settings.block_size + 1
    lengths = np.diff(np.asarray(store.starts), append=len(store.tokens))
    plan = pack(lengths, length, seed=0)
    rng = np.random.default_rng(0)

    def row(number: int) -> tuple[np.ndarray, ...]:
        tokens: list[int] = []
        segments: list[int] = []
        positions: list[int] = []
        records = plan.records[plan.offsets[number] : plan.offsets[number + 1]]
        for segment, record in enumerate(records, start=1):
            ids = store.record(record)[:length]
            tokens.extend(ids.tolist())
            segments.extend([segment] * len(ids))
            positions.extend(range(len(ids)))
        padding = [0] * (length - len(tokens))
        segment_ids = np.array(segments + padding)
        mask = (segment_ids[:-1] == segment_ids[1:]) & (segment_ids[1:] > 0)
        return np.array(tokens + padding), segment_ids[:-1], np.array(positions + padding)[:-1], mask

    def micro_batch() -> list[np.ndarray]:
        rows = [row(number) for number in rng.integers(0, plan.rows, settings.batch_size)]
        return [np.stack(leaves) for leaves in zip(*rows, strict=True)]

    return lambda: [micro_batch() for _ in range(settings.micro_batches)]


def rate(take: Take, tokens: int, settings: argparse.Namespace) -> list[float]:
    """Tokens a second of each run, after a warm-up."""
    for _ in range(5):
        take()
    rates = []
    for _ in range(settings.runs):
        steps, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < settings.seconds:
            take()
            steps += 1
        rates.append(steps * tokens / (time.perf_counter() - begun))
    return rates


def measure(store: TokenStore, settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rates of every way of cutting: the feed, reading its rows alone, and the plain implementation."""
    tokens = settings.micro_batches * settings.batch_size * settings.block_size
    shape = {name: getattr(settings, name) for name in ("block_size", "batch_size", "micro_batches")}
    results: dict[str, dict[str, Any]] = {}
    for windows in ("starts", "anywhere", "packed"):
        rows = open_rows(store, block_size=settings.block_size, windows=windows, seed=0)
        plain = (
            plain_packed(store, settings) if windows == "packed" else plain_windows(store, settings, windows)
        )
        numbers = np.random.default_rng(0).integers(0, len(rows), tokens // settings.block_size)
        found = {
            "plain": rate(plain, tokens, settings),
            "rows alone": rate(lambda rows=rows, numbers=numbers: rows.read(numbers), tokens, settings),
        }
        for underrep_p in (0.0, settings.underrep_p):
            try:
                feed = open_feed(store, windows=windows, seed=0, underrep_p=underrep_p, **shape)
            except DataError as error:
                print(f"{windows}, underrep_p {underrep_p}: {error}", file=sys.stderr)
                continue
            name = "feed" if underrep_p == 0 else f"feed, underrep_p {underrep_p}"
            found[name] = rate(feed.__next__, tokens, settings)
            feed.close()
        medians = {name: statistics.median(rates) for name, rates in found.items()}
        results[windows] = {
            "tokens_per_s": medians,
            "runs": found,
            "times_plain": medians["feed"] / medians["plain"],
            # What shuffling, threads and queues cost, as a part of the feed's time.
            "overhead": 1 - medians["feed"] / medians["rows alone"],
        }
        if isinstance(rows, PackedRows):
            results[windows]["filled"] = float(
                np.mean(
                    [np.mean(rows.read(np.array([i])).segment_ids > 0) for i in range(min(1000, len(rows)))]
                )
            )
    return results


def main() -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a prepared folder")
    parser.add_argument("--block-size", type=int, default=1024, help="tokens a row (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows a micro-batch (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches a step (%(default)s)")
    parser.add_argument("--underrep-p", type=float, default=0.1, help="of the mixture (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_feed.json"), help="JSON (%(default)s)"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs, of which the median counts (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds a run (%(default)s)")
    settings = parser.parse_args()
    try:
        store = TokenStore.open(settings.folder)
        int(np.asarray(store.tokens).sum())  # into memory
        busy = os.getloadavg()[0]
        results = measure(store, settings)
    except DataError as error:
        print(f"benchmarks/feed.py: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(store):,} records, {len(store.tokens):,} tokens, rows of {settings.block_size:,}, batches of"
        f" {settings.batch_size}; median of {settings.runs} runs; load {busy:.1f} on {os.cpu_count()} cores"
    )
    for windows, result in results.items():
        for name, tokens_per_s in result["tokens_per_s"].items():
            ratio = tokens_per_s / result["tokens_per_s"]["plain"]
            print(f"{windows:9} {name:22} {tokens_per_s / 1e6:9.1f} M tokens/s {ratio:8.1f} x")
        print(f"{windows:9} overhead of the feed's time {result['overhead']:.0%}")
    report = {
        "settings": {name: str(value) for name, value in vars(settings).items()},
        "records": len(store),
        "tokens": len(store.tokens),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_before": busy,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "grain")},
        "results": results,
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
