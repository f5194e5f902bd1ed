"""Texts validated a second: one parse and one site an orbit, against the published way, in the same run.

The published way parses the text anew for every verdict (five times for a valid text), runs CrystalNN on
every site and ends at the first verdict that fails; ours reaches all of them. `plain loop` is ours without
the orbits, to show what each of the two brings. The verdicts must agree.

Usage: python benchmarks/validate.py [--texts FILE.jsonl[.gz]] [--count N] [--out result.json]
Without --texts the texts are made from the AFLOW prototypes that pymatgen ships.
"""

import argparse
import gzip
import json
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Composition, Structure
from pymatgen.io.cif import CifParser
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from crystallm_jax.cif import CIFTokenizer, postprocess_cif, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import bond_length_score, validate
from crystallm_jax.evaluation.bonds import CrystalNN, expected_bond_length
from crystallm_jax.evaluation.parsing import build_structure, parse_blocks
from crystallm_jax.evaluation.validity import (
    is_formula_consistent,
    is_multiplicity_consistent,
    is_space_group_consistent,
)


def published_verdict(text: str) -> bool:
    """The published procedure: a parse for every verdict, up to the first that fails; an error fails."""
    try:
        return (
            _published_formula(text)
            and _published_multiplicity(text)
            and _published_bonds(text) >= 1.0
            and _published_space_group(text)
        )
    except Exception:  # noqa: BLE001 - as published: whatever it is, the text is not valid
        return False


def plain_verdict(text: str) -> bool:
    """Ours with a single parse, but with every site measured."""
    try:
        parsed = parse_blocks(text)
        structure, _ = build_structure(parsed)
        return (
            is_formula_consistent(text, parsed)
            and is_multiplicity_consistent(parsed)
            and is_space_group_consistent(structure, parsed)
            and bond_length_score(structure) >= 1.0
        )
    except Exception:  # noqa: BLE001 - as published: whatever it is, the text is not valid
        return False


def our_verdict(text: str) -> bool:
    """`validate` as users call it: every verdict, whichever fails."""
    return validate(text).valid


def _published_formula(text: str) -> bool:
    items = _first_block(text)
    stated = re.findall(r"data_([A-Za-z0-9]+)\n", text)
    entries = (stated[0], items["_chemical_formula_sum"], items["_chemical_formula_structural"])
    return len({Composition(entry).reduced_formula for entry in entries}) == 1


def _published_multiplicity(text: str) -> bool:
    blocks = CifParser.from_str(text).as_dict().values()
    found: dict[str, int] = {}
    for items in blocks:
        rows = zip(items["_atom_site_type_symbol"], items["_atom_site_symmetry_multiplicity"], strict=True)
        for symbol, multiplicity in rows:
            found[symbol] = found.get(symbol, 0) + int(multiplicity)
    return Composition(next(iter(blocks))["_chemical_formula_sum"]).as_dict() == found


def _published_bonds(text: str) -> float:
    structure = Structure.from_str(text, fmt="cif")
    neighbours = CrystalNN()
    good = total = 0
    for index, site in enumerate(structure):
        for neighbour in neighbours.get_nn_info(structure, index):
            if neighbour["site_index"] != index:
                symbols = site.specie.symbol, neighbour["site"].specie.symbol
                ratio = site.distance(neighbour["site"]) / expected_bond_length(*symbols)
                good += ratio < 2.5 if "H" in symbols else 0.68 < ratio < 1.32
                total += 1
    return good / total


def _published_space_group(text: str) -> bool:
    structure = Structure.from_str(text, fmt="cif")
    stated = _first_block(text)["_symmetry_space_group_name_H-M"]
    return stated.strip() == SpacegroupAnalyzer(structure, symprec=0.1).get_space_group_symbol().strip()


def _first_block(text: str) -> dict[str, Any]:
    return next(iter(CifParser.from_str(text).as_dict().values()))


def prototype_texts(count: int) -> list[str]:
    """Texts as a model would leave them after post-processing, of AFLOW prototypes of at most 100 sites."""
    tokenizer = CIFTokenizer()
    texts: list[str] = []
    for prototype in AFLOW_PROTOTYPE_LIBRARY:
        structure = prototype["snl"].structure
        if len(structure) <= 100 and len(texts) < count:
            try:
                stream = stream_text(preprocess_cif(symmetrized_cif(structure)))
                texts.append(
                    postprocess_cif(tokenizer.decode(tokenizer.encode(tokenizer.tokenize_cif(stream))))
                )
            except CIFError as error:
                print(f"left out: {error}")
    return texts


def read_texts(path: Path, count: int) -> list[str]:
    """The first texts of a JSON-lines file: field `post_text` or `cif`."""
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record.get("post_text", record.get("cif")) for record in records[:count]]


def measure(verdict: Callable[[str], bool], texts: Sequence[str]) -> tuple[float, list[bool]]:
    """Seconds for all texts, and the verdicts."""
    start = time.perf_counter()
    verdicts = [bool(verdict(text)) for text in texts]
    return time.perf_counter() - start, verdicts


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--texts", type=Path, help="JSON lines with post_text or cif; default: AFLOW prototypes"
    )
    parser.add_argument("--count", type=int, default=60, help="texts at most (default 60)")
    parser.add_argument(
        "--out", type=Path, default=Path("validate.json"), help="JSON result (default validate.json)"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    texts = (
        read_texts(arguments.texts, arguments.count) if arguments.texts else prototype_texts(arguments.count)
    )
    ways = {"published way": published_verdict, "plain loop": plain_verdict, "ours": our_verdict}
    our_verdict(texts[0])
    seconds, verdicts = {}, {}
    for name, way in ways.items():
        seconds[name], verdicts[name] = measure(way, texts)
    print(f"{'way':16}{'texts':>7}{'valid':>7}{'s':>9}{'texts/s':>9}{'speed-up':>10}")
    for name, taken in seconds.items():
        speed_up = seconds["published way"] / taken
        row = f"{name:16}{len(texts):7}{sum(verdicts[name]):7}{taken:9.2f}{len(texts) / taken:9.1f}"
        print(f"{row}{speed_up:9.2f}x")
    differing = sum(
        first != last for first, last in zip(verdicts["published way"], verdicts["ours"], strict=True)
    )
    print(f"verdicts that differ: {differing}")
    result = {
        "texts": len(texts),
        "seconds": seconds,
        "valid": {name: sum(found) for name, found in verdicts.items()},
        "verdicts_that_differ": differing,
        "versions": {name: version(name) for name in ("pymatgen", "numpy", "spglib")},
        "machine": platform.processor() or platform.machine(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
