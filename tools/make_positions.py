"""Makes the table of Wyckoff positions: `python tools/make_positions.py`, in some ten seconds.

The package must be installed. Everything follows from the operations in `crystallm_jax/cif/operations.json`.
"""

from pathlib import Path

import numpy as np

import crystallm_jax.cif
from crystallm_jax.cif.positions import TABLE_COLUMNS, derive_positions
from crystallm_jax.cif.spacegroups import spacegroup_operations
from crystallm_jax.cif.vocabulary import SPACEGROUPS, SPACEGROUPS_WITHOUT_TOKEN

TABLE = Path(crystallm_jax.cif.__file__).with_name("positions.npz")


def main() -> None:
    """Write the table, in the order of the numbers of the International Tables."""
    numbers = {**SPACEGROUPS, **SPACEGROUPS_WITHOUT_TOKEN}
    lines = []
    for symbol in sorted(numbers, key=numbers.__getitem__):
        for place, position in enumerate(derive_positions(spacegroup_operations(symbol))):
            for flat in position.flats:
                rows, constants = np.zeros((3, 3), int), np.zeros(3, int)
                rows[: len(flat.rows)] = np.array(flat.rows).reshape(-1, 3)
                constants[: len(flat.rows)] = flat.constants
                lines.append((numbers[symbol], place, position.multiplicity, rows, constants))
    columns = (np.array(column, np.int16) for column in zip(*lines, strict=True))
    np.savez_compressed(TABLE, **dict(zip(TABLE_COLUMNS, columns, strict=True)))
    print(f"{TABLE}: {len(lines)} flats")


if __name__ == "__main__":
    main()
