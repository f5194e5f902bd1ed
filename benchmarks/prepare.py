"""Preparation a core, stage by stage: ours beside the published procedure, on the same texts in one run.

    python benchmarks/prepare.py [CSV ...] [--limit N] [--runs N] [--out FILE]

symmetrise   a source's CIF to a symmetrised CIF: pymatgen's reader and `CifWriter(symprec=0.1)`
pre-process  symmetrised CIF to standardised text: formula, operations, element properties, rounding
tokenise     standardised text to token ids: patterns joined for each text, tokens sought in a list
all          the three in a row

Each stage of both ways gets the same input. The two take turns every 50 texts, so that whatever else the
machine does hits both, and what counts is the time of this process alone, on one core. Without a CSV the
input is the corpus in the package, written anew with every atom of the cell, as sources give their structures.
Texts that are symmetrised already are read by pymatgen in both ways, which leaves the first stage a ratio of
about 2.

`differ` counts the results that are not the same. Pre-processing is compared without the element properties,
since the ionic radius of Mn is another in pymatgen's tables of today; `all` is compared whole and counts it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymatgen.core import Composition, Structure
from pymatgen.io.cif import CifBlock, CifWriter
from tokenizer import published_encode

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.data.corpus import corpus_path
from crystallm_jax.data.readers import read_records
from crystallm_jax.data.reading.structures import parse_structure
from crystallm_jax.errors import CIFError, DataError

BATCH = 50
NOBLE_ELECTRONEGATIVITY = {"He": 4.16, "Ne": 4.79, "Ar": 3.24}
NOBLE_RADIUS = {"He": 1.4, "Ne": 1.54, "Ar": 1.88, "Kr": 2.02, "Xe": 2.16}
PROPERTY_ROW = re.compile(r"^  [A-Z][a-z]?  [\d.]+  [\d.]+  [\d.]+\n", re.MULTILINE)
OPERATIONS = re.compile(r"(_symmetry_equiv_pos_as_xyz\n).*?(?=\n(?:\S| \S))", re.DOTALL)
TOKENIZER = CIFTokenizer()


class Stage(NamedTuple):
    """A stage: its inputs, the two ways, and whether what they give is the same."""

    texts: Sequence[str]
    published: Callable[[str], Any]
    ours: Callable[[str], Any]
    same: Callable[[Any, Any], bool]


def published_symmetrize(text: str) -> str:
    """A CIF text to a symmetrised one, all by pymatgen."""
    return str(CifWriter(Structure.from_str(text, fmt="cif"), symprec=0.1))


def our_symmetrize(text: str) -> str:
    """The same by the package."""
    return symmetrized_cif(parse_structure(text))


def published_preprocess(text: str) -> str:
    """The four steps, with regular expressions and pymatgen."""
    formula = re.search(r"_chemical_formula_sum\s+(.+)\n", text)[1].replace("'", "")  # type: ignore[index]
    text = re.sub(r"data_.*?\n", f"data_{formula.replace(' ', '')}\n", text)
    text = OPERATIONS.sub(r"\1  1  'x, y, z'", text)
    tag = "_symmetry_space_group_name_H-M"
    text = text.replace(tag, f"{published_properties(formula)}\n{tag}", 1)
    return re.sub(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?", round_number, text)


def published_properties(formula: str) -> str:
    """The block of element properties, from pymatgen's tables of today."""
    elements = sorted(Composition(formula).elements, key=lambda e: NOBLE_ELECTRONEGATIVITY.get(e.symbol, e.X))
    keys = [f"_atom_type_{name}" for name in ("symbol", "electronegativity", "radius", "ionic_radius")]
    columns: list[list[str]] = [[], [], [], []]
    for element in elements:
        symbol = element.symbol
        radius = NOBLE_RADIUS.get(symbol) or f"{element.atomic_radius:.4f}"
        columns[0].append(symbol)
        columns[1].append(str(NOBLE_ELECTRONEGATIVITY.get(symbol) or f"{element.X:.4f}"))
        columns[2].append(str(radius))
        columns[3].append(f"{element.average_ionic_radius:.4f}")
    block = CifBlock(dict(zip(keys, columns, strict=True)), [keys], "")
    return str(block).partition("\n")[2]


def round_number(match: re.Match[str]) -> str:
    """A number of more than 4 decimals with 4."""
    number = match[0]
    return f"{round(float(number), 4):.4f}" if len(number.split(".")[-1]) > 4 else number


def published_tokenize(text: str) -> list[int]:
    """A standardised text to ids: lines stripped, then the published tokenizer."""
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if line and not line.startswith("#") and "pymatgen" not in line]
    return published_encode("\n".join(kept) + "\n\n")


def our_tokenize(text: str) -> Any:
    """The same by the package."""
    return TOKENIZER.encode_cif(stream_text(text))


def same_stream(published: str, ours: str) -> bool:
    """Whether two symmetrised texts come to the same standardised one."""
    return stream_text(preprocess_cif(published)) == stream_text(preprocess_cif(ours))


def same_but_radii(published: str, ours: str) -> bool:
    """Whether two standardised texts are the same but for the element tables, which differ (Mn)."""
    return PROPERTY_ROW.sub("", published) == PROPERTY_ROW.sub("", ours)


def usable(texts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The texts that both ways take, symmetrised and standardised ones of ours, to start the stages from."""
    taken, symmetrized, standardized = [], [], []
    for text in texts:
        try:
            ours = our_symmetrize(text)
            published_preprocess(published_symmetrize(text))
        except (CIFError, ValueError, TypeError) as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        taken.append(text)
        symmetrized.append(ours)
        standardized.append(preprocess_cif(ours))
    return taken, symmetrized, standardized


def measure(stage: Stage, runs: int) -> tuple[list[float], list[float], int]:
    """Seconds a text of each run, published and ours, and how many results differ."""
    seconds: tuple[list[float], list[float]] = ([], [])
    differing = 0
    for run in range(runs):
        spent = [0.0, 0.0]
        for first in range(0, len(stage.texts), BATCH):
            batch = stage.texts[first : first + BATCH]
            results = []
            for i, way in enumerate((stage.published, stage.ours)):
                start = time.process_time()
                results.append([way(text) for text in batch])
                spent[i] += time.process_time() - start
            if run == 0:
                differing += sum(not stage.same(*pair) for pair in zip(*results, strict=True))
        for taken, total in zip(seconds, spent, strict=True):
            taken.append(total / len(stage.texts))
    return *seconds, differing


def read_texts(path: Path, limit: int) -> list[str]:
    """At most `limit` texts of an input, evenly spread over it."""
    found = [record.text for record in read_records(path) if record.form == "cif" and record.problem is None]
    count = min(limit, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def make_stages(texts: Sequence[str]) -> dict[str, Stage]:
    """The stages over the texts that both ways take."""
    taken, symmetrized, standardized = usable(texts)

    def published(text: str) -> list[int]:
        return published_tokenize(published_preprocess(published_symmetrize(text)))

    def ours(text: str) -> Any:
        return our_tokenize(preprocess_cif(our_symmetrize(text)))

    def same_ids(first: Any, second: Any) -> bool:
        return list(first) == list(second)

    return {
        "symmetrise": Stage(taken, published_symmetrize, our_symmetrize, same_stream),
        "pre-process": Stage(symmetrized, published_preprocess, preprocess_cif, same_but_radii),
        "tokenise": Stage(standardized, published_tokenize, our_tokenize, same_ids),
        "all": Stage(taken, published, ours, same_ids),
    }


def main() -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", type=Path, nargs="*", help="what prepare reads (default: the corpus inside)"
    )
    parser.add_argument("--limit", type=int, default=200, help="texts of each input (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs, of which the median counts (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_prepare.json"), help="(%(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        texts = [text for path in arguments.inputs for text in read_texts(path, arguments.limit)]
    except DataError as error:
        parser.error(str(error))
    if not arguments.inputs:
        texts = [str(CifWriter(parse_structure(text))) for text in read_texts(corpus_path(), arguments.limit)]
    stages = make_stages(texts)
    count = len(stages["all"].texts)
    if count == 0:
        print("no text of the input can be prepared by both ways", file=sys.stderr)
        return 1
    print(f"{count} of {len(texts)} texts, ms of this process a text, median of {arguments.runs} runs")
    print(f"{'stage':12}{'published':>11}{'ours':>9}{'ratio':>9}{'ours, texts/s':>15}{'differ':>8}")
    results = {}
    for name, stage in stages.items():
        published, ours, differing = measure(stage, arguments.runs)
        first, second = statistics.median(published), statistics.median(ours)
        print(
            f"{name:12}{1e3 * first:11.3f}{1e3 * second:9.3f}{first / second:8.1f}x"
            f"{1 / second:15,.0f}{differing:8}"
        )
        results[name] = {
            "published_seconds": published,
            "our_seconds": ours,
            "ratio": first / second,
            "differing": differing,
        }
    report = {
        "inputs": [path.name for path in arguments.inputs] or ["embedded"],
        "texts": count,
        "left_out": len(texts) - count,
        "stages": results,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "pymatgen", "spglib")},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
