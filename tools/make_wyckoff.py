"""Makes the table of site classes: `python tools/make_wyckoff.py`, in half a minute.

The package must be installed. Everything follows from the operations in `crystallm_jax/cif/operations.json`.
"""

import json
from pathlib import Path

import crystallm_jax.cif
from crystallm_jax.cif.spacegroups import spacegroup_operations
from crystallm_jax.cif.vocabulary import SPACEGROUPS, SPACEGROUPS_WITHOUT_TOKEN
from crystallm_jax.cif.wyckoff import derive_site_classes

TABLE = Path(crystallm_jax.cif.__file__).with_name("wyckoff.json")


def line(symbol: str) -> str:
    """The group's line: positions without free parameters by multiplicity, and multiplicities of the others."""
    classes = derive_site_classes(spacegroup_operations(symbol))
    fixed = {str(multiplicity): count for multiplicity, count in classes if count is not None}
    free = [multiplicity for multiplicity, count in classes if count is None]
    return f"{json.dumps(symbol)}:{json.dumps([fixed, free], separators=(',', ':'))}"


def main() -> None:
    """Write the table, in the order of the numbers of the International Tables."""
    numbers = {**SPACEGROUPS, **SPACEGROUPS_WITHOUT_TOKEN}
    lines = [line(symbol) for symbol in sorted(numbers, key=numbers.__getitem__)]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{TABLE}: {len(lines)} space groups")


if __name__ == "__main__":
    main()
