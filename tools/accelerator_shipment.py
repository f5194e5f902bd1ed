"""What travels to a bare machine: a run's settings, its tokens, compressed, and a few golden files.

    settings.json     the run, a `TrainConfig`, and the name of the data set
    meta.json         of the prepared folder, as it is there
    SPLIT.tokens.xz   token ids of train and val, all low bytes before all high ones
    SPLIT.starts.xz   int64 differences of the offsets at which records start
    golden/           checkpoints of the published code with their logits, where they were packed

It is packed where all of the package can be imported, and opened where neither OmegaConf nor grain can.
"""

import json
import lzma
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.data.store import TOKEN_DTYPE, TokenStore
from crystallm_jax.errors import DataError, ModelError
from crystallm_jax.files import new_file
from crystallm_jax.train_run.train_config import TrainConfig

SETTINGS_FILE, HEADER_FILE, GOLDEN_FOLDER = "settings.json", "meta.json", "golden"
SPLITS = ("train", "val")
GOLDEN_MODELS = ("a", "b", "c")
GREEDY_FILE = "sampling.npz"
GOLDEN_FILES = (
    *(f"model/{name}/{file}" for name in GOLDEN_MODELS for file in ("ckpt.pt", "logits.npz")),
    GREEDY_FILE,
)
LARGEST_TOKENS = 40 * 2**20
"""Bytes that the compressed tokens may have: what travels is limited, and weights travel beside them."""
_START_DTYPE = np.dtype("<i8")


class Shipment(NamedTuple):
    """What was packed, unpacked; `golden` is None where no golden files are with it."""

    config: TrainConfig
    dataset: str
    store: TokenStore
    val_store: TokenStore
    golden: Path | None


def byte_planes(values: np.ndarray) -> np.ndarray:
    """The bytes of 16-bit numbers apart, uint8 [2, ...], all low ones first: so they compress better."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return np.moveaxis(little[..., None].view(np.uint8), -1, 0)


def from_byte_planes(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The 16-bit numbers of `byte_planes`, of a little-endian type."""
    return np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(dtype)[..., 0]


def pack_tokens(dataset: Path, out: Path) -> None:
    """Write the tokens of a prepared folder to `out`; what is there already of the same folder is left.

    Raises:
        CrystallmError: no such folder, one without a header or a split, or tokens that are too many.
    """
    stores = [TokenStore.open(dataset, split) for split in SPLITS]
    try:
        header = (dataset / HEADER_FILE).read_bytes()
    except OSError:
        raise DataError(
            f"{dataset}: has no {HEADER_FILE}: prepare it with 'crystallm prepare {dataset} --out DIR'"
        ) from None
    if is_packed(out, header):
        return
    (out / HEADER_FILE).unlink(missing_ok=True)
    for store in stores:
        store.verify()
        _write_packed(out / f"{store.split}.tokens.xz", byte_planes(np.asarray(store.tokens)))
        _write_packed(out / f"{store.split}.starts.xz", np.diff(store.starts.astype(_START_DTYPE), prepend=0))
    if (size := sum((out / f"{split}.tokens.xz").stat().st_size for split in SPLITS)) > LARGEST_TOKENS:
        raise DataError(
            f"{dataset}: its tokens have {size / 2**20:.1f} MiB compressed, {LARGEST_TOKENS / 2**20:.0f} may travel:"
            " prepare fewer records"
        )
    with new_file(out / HEADER_FILE, ModelError) as partial:
        partial.write_bytes(header)


def is_packed(out: Path, header: bytes) -> bool:
    """Whether the tokens of the prepared folder with this header lie in `out` already."""
    files = [out / f"{split}.{part}.xz" for split in SPLITS for part in ("tokens", "starts")]
    there = all(file.is_file() for file in (out / HEADER_FILE, *files))
    return there and (out / HEADER_FILE).read_bytes() == header


def pack_golden(golden: Path | None, out: Path) -> None:
    """Copy the golden files that are checked; None packs none, and removes those that an earlier call packed.

    Raises:
        DataError: one is missing.
    """
    shutil.rmtree(out / GOLDEN_FOLDER, ignore_errors=True)
    for name in GOLDEN_FILES if golden is not None else ():
        source, target = golden / name, out / GOLDEN_FOLDER / name
        if not source.is_file():
            raise DataError(f"{source}: no such golden file: give the folder that holds model/ to --golden")
        with new_file(target, ModelError) as partial:
            shutil.copyfile(source, partial)


def write_settings(config: dict[str, Any], dataset: str, out: Path) -> None:
    """Write the settings, which make the shipment complete."""
    with new_file(out / SETTINGS_FILE, ModelError) as partial:
        partial.write_text(
            json.dumps({"dataset": dataset, "train": config}, indent=1) + "\n", encoding="utf-8"
        )


def open_shipment(folder: Path, work: Path) -> Shipment:
    """Read a shipment, its tokens unpacked into `work`.

    Raises:
        CrystallmError: there is none, or it is damaged.
    """
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_bytes())
        config, dataset = TrainConfig(**settings["train"]), str(settings["dataset"])
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no shipment there (no {SETTINGS_FILE}): make it with"
            f" 'python tools/accelerator_run.py pack --out {folder}'"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / SETTINGS_FILE}: cannot be read ({error}): pack it again") from None
    tokens = work / "tokens"
    for split in SPLITS:
        planes = np.frombuffer(_read_packed(folder / f"{split}.tokens.xz"), np.uint8).reshape(2, -1)
        with new_file(tokens / f"{split}.bin", ModelError) as partial:
            from_byte_planes(planes, TOKEN_DTYPE).tofile(partial)
        steps = np.frombuffer(_read_packed(folder / f"{split}.starts.xz"), _START_DTYPE)
        with (
            new_file(tokens / f"{split}.starts.npy", ModelError) as partial,
            partial.open("wb") as stream,
        ):
            np.save(stream, np.cumsum(steps, dtype=np.int64))
    with new_file(tokens / HEADER_FILE, ModelError) as partial:
        shutil.copyfile(folder / HEADER_FILE, partial)
    stores = [TokenStore.open(tokens, split) for split in SPLITS]
    for store in stores:
        store.verify()
    golden = folder / GOLDEN_FOLDER
    return Shipment(config, dataset, *stores, golden if golden.is_dir() else None)


def sizes(out: Path) -> Sequence[tuple[str, int]]:
    """The files of a shipment by name, with their bytes."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return [(path.relative_to(out).as_posix(), path.stat().st_size) for path in files]


def _write_packed(path: Path, values: np.ndarray) -> None:
    with new_file(path, ModelError) as partial, lzma.open(partial, "wb") as stream:
        stream.write(np.ascontiguousarray(values).data)


def _read_packed(path: Path) -> bytes:
    try:
        with lzma.open(path) as stream:
            return stream.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}): pack it again") from None
