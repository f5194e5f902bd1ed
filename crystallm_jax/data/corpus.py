"""The embedded corpus: 3,000 ionic crystals that ship with the package, so that nothing need be downloaded.

`tools/make_corpus.py` made it from AFLOW prototypes; `crystallm prepare` reads the file as any other CSV.
"""

from collections.abc import Iterator
from pathlib import Path

from crystallm_jax.data.readers import read_records
from crystallm_jax.data.record import Record

EMBEDDED = "embedded"
"""The name by which `prepare` and `train` know it."""


def corpus_path() -> Path:
    """The file itself: xz-compressed CSV with the columns `id`, `prototype`, `charges` and `cif`.

    `charges` lists the ion of each element, as in `Ca2+ Ti4+ O2-`; `cif` is a symmetrised text.
    """
    return Path(__file__).with_name("corpus.csv.xz")


def read_corpus() -> Iterator[Record]:
    """Yield the corpus's crystals, in the order of the file.

    Raises:
        DataError: where the installation lacks the file or holds a broken one.
    """
    return read_records(corpus_path())
