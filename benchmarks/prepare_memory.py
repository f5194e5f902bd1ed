"""Peak memory of `crystallm prepare` over the number of records, on synthetic crystals.

    python benchmarks/prepare_memory.py [--records 30000 300000] [--workers 2] [--format jsonl.gz] [--out FILE]

Each record is a triclinic cell of two atoms, of random elements and lengths (its symmetry is found quickly); the run
deduplicates, splits by formula and shuffles, so that everything that looks at all records is in it. Memory is the
proportional set size (PSS) of the process and its workers, read every half second; Linux only.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import platform
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from crystallm_jax.cif import ELEMENTS

CELL = """data_{a}{b}
_symmetry_space_group_name_H-M   'P 1'
_cell_length_a   {lengths[0]:.8f}
_cell_length_b   {lengths[1]:.8f}
_cell_length_c   {lengths[2]:.8f}
_cell_angle_alpha   81.0
_cell_angle_beta   90.0
_cell_angle_gamma   76.0
_symmetry_Int_Tables_number   1
_chemical_formula_structural   {a}{b}
_chemical_formula_sum   '{a}1 {b}1'
_cell_formula_units_Z   1
loop_
 _symmetry_equiv_pos_site_id
 _symmetry_equiv_pos_as_xyz
  1  'x, y, z'
loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_symmetry_multiplicity
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy
  {a}  {a}0  1  0.00000000  0.00000000  0.00000000  1
  {b}  {b}1  1  0.50000000  0.50000000  0.50000000  1
"""


def crystals(count: int) -> Iterator[tuple[str, str]]:
    """(id, CIF text) of synthetic crystals."""
    rng = random.Random(count)
    symbols = sorted(set(ELEMENTS) - {"He", "Ne", "Ar"})
    for i in range(count):
        a, b = rng.sample(symbols, 2)
        yield f"synthetic-{i}", CELL.format(a=a, b=b, lengths=[rng.uniform(3, 6) for _ in range(3)])


def write_crystals(path: Path, count: int) -> None:
    """Write them in the format that the name ends in."""
    if path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "wt", compresslevel=1) as stream:
            for name, text in crystals(count):
                stream.write(json.dumps({"id": name, "cif": text}) + "\n")
    elif path.name.endswith(".pkl.gz"):
        with gzip.open(path, "wb", compresslevel=1) as stream:
            pickle.dump(list(crystals(count)), stream)
    else:
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for name, text in crystals(count):
                member = tarfile.TarInfo(f"{name}.cif")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))


def tree(pid: int) -> list[int]:
    """A process and those below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it ended
            continue
        for child in children:
            found += tree(int(child))
    return found


def memory(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(source: Path, out: Path, workers: int) -> dict[str, float]:
    """Run the verb; its greatest memory, alone and with its workers, and its seconds."""
    command = [
        sys.executable,
        "-m",
        "crystallm_jax",
        "prepare",
        str(source),
        "--out",
        str(out),
        "--dedup",
        "--shuffle",
    ]
    command += ["--split", "--split-by", "formula", "--workers", str(workers)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    alone = whole = 0
    while process.poll() is None:
        first, *others = (memory(pid) for pid in tree(process.pid))
        alone, whole = max(alone, first), max(whole, first + sum(others))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit("the preparation failed")
    counts = json.loads((out / "meta.json").read_text())["counts"]
    seconds = time.perf_counter() - begin
    return {"peak_main_bytes": alone, "peak_all_bytes": whole, "seconds": seconds, **counts}


def main() -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", type=int, nargs="+", default=[30_000, 300_000], help="numbers of records"
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes (%(default)s)")
    parser.add_argument(
        "--format", choices=("jsonl.gz", "pkl.gz", "tar.gz"), default="jsonl.gz", help="of the input"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_prepare_memory.json"), help="JSON (%(default)s)"
    )
    arguments = parser.parse_args()
    results = {}
    print(f"{'records':>10} {'main process':>14} {'with workers':>14} {'seconds':>9} {'records/s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.records:
            source = Path(folder) / f"{count}.{arguments.format}"
            write_crystals(source, count)
            row = results[count] = measure(source, Path(folder) / str(count), arguments.workers)
            print(
                f"{count:>10,} {row['peak_main_bytes'] / 2**20:>10,.0f} MiB {row['peak_all_bytes'] / 2**20:>10,.0f} MiB"
                f" {row['seconds']:>9,.0f} {count / row['seconds']:>10,.0f}"
            )
    report = {
        "format": arguments.format,
        "workers": arguments.workers,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
