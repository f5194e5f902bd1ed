"""Whether the files of a checkpoint are as they were written: a checksum for each, in a file beside them.

The store of arrays checks its indices, not what the arrays hold: of a bit that turned in them it says nothing.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from crystallm_jax.files import new_file

CHECKSUMS_FILE = "checksums.json"
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, OSError)
"""What reading a damaged checkpoint ends in, in orbax, in tensorstore below it, or here."""
# The time of completion is written into it last; nothing of it is needed to restore.
_LEFT_OUT = "_CHECKPOINT_METADATA"
_PIECE = 1 << 20


def write_checksums(folder: Path) -> None:
    """Write the size and CRC-32 of every file under a finished checkpoint's folder; it appears when it is complete."""
    files = {name: [path.stat().st_size, _crc32(path)] for name, path in _files(folder).items()}
    with new_file(folder / CHECKSUMS_FILE) as partial:
        partial.write_text(json.dumps({"crc32": files}) + "\n")


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None where nothing is.

    A checkpoint without checksums (of an earlier version, or of a run that was killed the moment after it was
    complete) cannot be told: None.
    """
    sums = folder / CHECKSUMS_FILE
    if not sums.exists():
        return None
    try:
        expected: dict[str, Any] = json.loads(sums.read_bytes())["crc32"]
        found = (_difference(name, folder / name, size, crc32) for name, (size, crc32) in expected.items())
        return next((difference for difference in found if difference is not None), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} cannot be read"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def _difference(name: str, path: Path, size: int, crc32: int) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{name} has {found:,} bytes, {size:,} were written"
    return None if _crc32(path) == crc32 else f"{name} has changed since it was written"


def _files(folder: Path) -> dict[str, Path]:
    """Every file under a folder by its name in it, but for the checksums themselves."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((CHECKSUMS_FILE, _LEFT_OUT))
    }


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc32 = zlib.crc32(piece, crc32)
    return crc32
