"""Speed of the tokenizer's fast path beside the published procedure, on the same texts in one run.

    python benchmarks/tokenizer.py [FOLDER_OR_JSONL] [--out FILE] [--runs N]

The input is a `.jsonl.gz` with a field `stream_text` (the golden `prep.jsonl.gz`), or a folder of `.txt`
texts; without one, the two texts of the tests with changing digits.
"""

import argparse
import gzip
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from crystallm_jax.cif import SPACEGROUPS, CIFTokenizer
from crystallm_jax.cif.vocabulary import TOKENS

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "cif"
KNOWN = list(TOKENS[:-1])
ESCAPED = sorted((re.escape(token) for token in KNOWN), key=len, reverse=True)
ID_OF_TOKEN = {token: i for i, token in enumerate(TOKENS)}


def published_encode(text: str) -> list[int]:
    """Tokenise as the published code does: patterns joined for each text, tokens sought in a list."""
    tag = f"_symmetry_space_group_name_H-M *\\b({'|'.join(SPACEGROUPS)})"
    text = re.sub(rf"({tag})\n", r"\1_sg\n", text)
    text = re.sub(r"[ \t]+", " ", text)
    found = re.findall(rf"({'|'.join(ESCAPED)}|\w+|[\.,;!?])", text)
    tokens = [token if token in KNOWN else "<unk>" for token in found]
    return [ID_OF_TOKEN[token] for token in tokens]


def read_texts(source: Path | None) -> list[str]:
    """The texts of the input, or the fixtures fifty times with their last digits changed."""
    if source is None:
        texts = [path.read_text() for path in sorted(FIXTURES.glob("*.stream.txt"))]
        return [re.sub(r"\d\n", f"{i % 10}\n", text) for i in range(50) for text in texts]
    if source.is_dir():
        return [path.read_text() for path in sorted(source.glob("*.txt"))]
    with gzip.open(source, "rt") as lines:
        return [json.loads(line)["stream_text"] for line in lines]


def seconds(encode: Callable[[str], object], texts: list[str], runs: int) -> list[float]:
    """Seconds that each run over all texts took."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        for text in texts:
            encode(text)
        taken.append(time.perf_counter() - start)
    return taken


def main() -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, nargs="?", help="texts (default: those of the tests)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_tokenizer.json"), help="JSON (%(default)s)"
    )
    parser.add_argument("--runs", type=int, default=7, help="runs, of which the median counts (%(default)s)")
    arguments = parser.parse_args()
    texts = read_texts(arguments.input)
    tokenizer = CIFTokenizer()
    tokens = sum(len(published_encode(text)) for text in texts)
    for text in texts:
        if tokenizer.encode_cif(text).tolist() != published_encode(text):
            print(f"the ids differ on a text that begins {text[:40]!r}", file=sys.stderr)
            return 1
    ways: dict[str, Callable[[str], object]] = {
        "published procedure": published_encode,
        "encode(tokenize_cif(text))": lambda text: tokenizer.encode(tokenizer.tokenize_cif(text)),
        "encode_cif(text)": tokenizer.encode_cif,
    }
    results = {}
    print(f"{len(texts)} texts, {tokens} tokens, median of {arguments.runs} runs, one process")
    for name, encode in ways.items():
        taken = seconds(encode, texts, arguments.runs)
        rate = tokens / statistics.median(taken)
        results[name] = {"tokens_per_s": rate, "seconds": taken}
        ratio = rate / results["published procedure"]["tokens_per_s"]
        print(f"{name:32} {rate / 1e6:8.2f} M tokens/s {ratio:8.1f} x")
    report = {"texts": len(texts), "tokens": tokens, "python": platform.python_version(), "results": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
