"""Reading which records are under-represented: the published pickled list of pairs, or a CSV."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from crystallm_jax.cif.formula import cell_formula, parse_formula
from crystallm_jax.cif.spacegroups import find_spacegroup
from crystallm_jax.data.preparing.selection import Pair
from crystallm_jax.data.reading.pickles import iterate_list
from crystallm_jax.data.reading.streams import DAMAGE, open_unpacked
from crystallm_jax.errors import CIFError, DataError

_PICKLE = b"\x80"
_COLUMNS = ("composition", "spacegroup")


def read_pairs(path: Path) -> Iterator[Pair]:
    """The (cell formula, space group) pairs of a file, in the corpus's writing.

    Args:
        path: a CSV with the columns `composition` (of the whole cell, as `Na4Cl4`) and `spacegroup` (symbol or number),
            or the published pickled list of such pairs; also compressed.

    Raises:
        DataError: no such file, another kind of file, or a pair that is none; also while pairs are read.
    """
    if not path.is_file():
        raise DataError(f"no file {path} of under-represented pairs: check the name")
    try:
        with open_unpacked(path) as stream:
            is_pickle = stream.read(1) == _PICKLE
    except DAMAGE as error:
        raise DataError(
            f"{path} cannot be read ({' '.join(str(error).split())}): check that it is whole"
        ) from error
    pairs = iterate_list(partial(open_unpacked, path), str(path)) if is_pickle else _csv_pairs(path)
    return (_pair(path, number, pair) for number, pair in enumerate(pairs, start=1))


def _pair(path: Path, number: int, pair: Any) -> Pair:
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
        raise DataError(f"{path}, pair {number}: {str(pair)[:60]!r} is no (cell composition, space group)")
    try:
        return Pair(cell_formula(parse_formula(pair[0])), find_spacegroup(pair[1]))
    except CIFError as error:
        raise DataError(f"{path}, pair {number}: {error}") from error


def _csv_pairs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open_unpacked(path) as stream:
            reader = csv.DictReader(line.decode("utf-8-sig") for line in stream)
            if not set(_COLUMNS) <= set(reader.fieldnames or ()):
                raise DataError(f"{path} lacks the columns {' and '.join(_COLUMNS)}: name them so")
            for row in reader:
                yield (row["composition"] or "").strip(), (row["spacegroup"] or "").strip()
    except (csv.Error, UnicodeDecodeError, *DAMAGE) as error:
        raise DataError(f"{path} is no valid CSV ({' '.join(str(error).split())}): check it") from error
