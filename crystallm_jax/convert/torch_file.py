"""Reads the zip files that `torch.save` writes, without PyTorch and without executing what is in them.

Such a file is a zip archive: a pickle that describes the object, and a member of raw bytes for each tensor storage.
The pickle is read by an unpickler that knows the few names that tensors and plain containers need and refuses all
others.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.errors import ModelError

# A member may not claim to unpack to more than this many times its packed size: tensors are stored unpacked.
MAX_EXPANSION = 8

_STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


# What zipfile and pickle raise on a file that is none, is cut short, encrypted, or nested too deep.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    IndexError,
    OSError,
    RuntimeError,
)


class _StorageType(NamedTuple):
    name: str


class _Storage(NamedTuple):
    values: np.ndarray


def read_torch_file(path: str | Path) -> Any:
    """Read the object that `torch.save` wrote, its tensors as NumPy arrays.

    Raises:
        ModelError: not such a file, truncated, or holding anything but tensors and plain containers.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder, not a PyTorch checkpoint") from None
    except _DAMAGE as error:
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ModelError(f"{path}: not a PyTorch checkpoint, or a damaged one: {reason}") from None
    except (TypeError, ValueError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ModelError(f"{path}: its description of the tensors is damaged: {reason}") from None


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ModelError(f"{path}: a zip file, but not one that torch.save wrote (no single data.pkl in it)")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and _read_member(archive, order).strip() != b"little":
        raise ModelError(f"{path}: saved on a big-endian machine, which is not supported")
    return _TensorUnpickler(archive, root).load()


class _TensorUnpickler(pickle.Unpickler):
    """Resolves the names that tensors need to functions of our own, and no other name."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        description = _read_member(archive, f"{root}data.pkl")
        _check_sizes(description)
        super().__init__(io.BytesIO(description), encoding="utf-8")
        self._archive = archive
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and (name in _STORAGE_DTYPES or name == "BFloat16Storage"):
            return _StorageType(name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which a checkpoint has no need of; refused")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not str(key).isalnum():
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        data = _read_member(self._archive, f"{self._root}data/{key}")
        if storage_type.name == "BFloat16Storage":
            # bfloat16 is the upper half of a float32.
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, _STORAGE_DTYPES[storage_type.name])
        if values.size < count:
            raise pickle.UnpicklingError(f"storage {key} holds {values.size} of {count} numbers")
        return _Storage(values)


def _check_sizes(description: bytes) -> None:
    """Refuse lengths and memo numbers beyond the pickle's own: the unpickler would allocate memory for them first."""
    for opcode, argument, _ in pickletools.genops(description):  # raises ValueError for such a length
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(description):
            raise pickle.UnpicklingError(f"its memo number {argument} is beyond its {len(description)} bytes")


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MAX_EXPANSION * info.compress_size + 4096:
        raise pickle.UnpicklingError(
            f"member {name} claims to unpack from {info.compress_size} to {info.file_size} bytes; refused"
        )
    return archive.read(info)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> np.ndarray:
    values = storage.values
    if len(shape) != len(stride) or offset < 0 or any(n < 0 for n in (*shape, *stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= values.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches beyond its {values.size} numbers")
    if math.prod(shape) > values.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} over {values.size} numbers")
    strides = tuple(step * values.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], shape, strides).copy()


def _rebuild_parameter(tensor: np.ndarray, *_: object) -> np.ndarray:
    return tensor
