"""The crystals that the model in the package learns from and is measured on: prepared where they are not yet."""

from pathlib import Path
from typing import NamedTuple

from crystallm_jax.cli import main as crystallm
from crystallm_jax.data.corpus import EMBEDDED
from crystallm_jax.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Where crystals lie beside a checkout: a folder a set, with train.csv, val.csv and test.csv, compressed or not."""
CRYSTALS = "crystals of the Materials Project (CC BY 4.0; A. Jain et al., APL Materials 1, 011002, 2013)"
"""What they are, for the card."""
_COMPRESSIONS = ("", ".xz", ".gz")
# Of the embedded corpus for validation and test, as `crystallm train dataset=embedded` has it.
_EMBEDDED_SPLIT = "0.04,0.03"


class RawData(NamedTuple):
    """What is prepared into `folder`, and how.

    Attributes:
        source: a folder of raw crystals, or `embedded`, the corpus in the package.
        folder: the prepared folder.
        flags: of `crystallm prepare`.
    """

    source: str
    folder: Path
    flags: tuple[str, ...] = ()


def prepare_where_needed(data: RawData) -> int:
    """Prepare crystals, unless that is done; returns the exit code of `crystallm prepare`, 0 where nothing is to do.

    A preparation that was stopped goes on where it was.

    Raises:
        DataError: the raw crystals are not there.
    """
    # A preparation gives this file its name last.
    if data.folder.is_file() or (data.folder / "meta.json").is_file():
        return 0
    if data.source == EMBEDDED:
        return crystallm(["prepare", EMBEDDED, "--split", _EMBEDDED_SPLIT, "--out", str(data.folder)])
    files = {split: _found(Path(data.source), split) for split in ("train", "val", "test")}
    missing = [f"{split}.csv" for split, file in files.items() if file is None]
    if missing:
        raise DataError(
            f"{data.folder} is not prepared, and {data.source} has no {', '.join(missing)} (.xz, .gz) to prepare it"
            " from: get crystals of the Materials Project as CSV with the columns material_id and cif and give"
            f" --data FOLDER, or `crystallm prepare FILE {' '.join(('--split', *data.flags))} --out {data.folder}`,"
            f" or train on the corpus in the package with --dataset {EMBEDDED}"
        )
    sets = [str(files["train"]), "--val", str(files["val"]), "--test", str(files["test"])]
    return crystallm(["prepare", *sets, *data.flags, "--out", str(data.folder)])


def _found(folder: Path, split: str) -> Path | None:
    paths = (folder / f"{split}.csv{compression}" for compression in _COMPRESSIONS)
    return next((path for path in paths if path.is_file()), None)
