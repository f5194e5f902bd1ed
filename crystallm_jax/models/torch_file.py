"""Reads the zip files that `torch.save` writes, without PyTorch and without executing what is in them.

Such a file is a zip archive: a pickle that describes the object, and a member of raw bytes for each tensor storage.
The pickle is read by an unpickler that knows the few names that tensors and plain containers need and refuses all
others. The bytes of a tensor are read when it is asked for.
"""

import collections
import contextlib
import io
import math
import pickle
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.errors import ModelError

# A member may not claim to unpack to more than this many times its packed size: tensors are stored unpacked.
MAX_EXPANSION = 8
# Tensors may not claim more than this many times the bytes that they are views of: a tied one has two names, say.
MAX_SHARING = 8

_BFLOAT16 = "BFloat16Storage"
_STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    # As they are stored: the upper halves of float32.
    _BFLOAT16: np.dtype("<u2"),
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
# How other files begin that are called .pt: what PyTorch before 1.6 wrote, a pickle of a number; safetensors have the
# length of their header, eight bytes, before a brace.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_SAFETENSORS_BRACE = 8


class _StorageType(NamedTuple):
    name: str


class _Members:
    """The members of an archive; the one read last is kept, for tensors that are parts of one storage."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.path = path
        self._archive = archive
        self._size = path.stat().st_size
        self._last: tuple[str, bytes] = ("", b"")

    def names(self) -> list[str]:
        return self._archive.namelist()

    def size(self, name: str) -> int:
        """Bytes of a member when unpacked; refuses one that claims more than can be."""
        info = self._archive.getinfo(name)
        if info.file_size > MAX_EXPANSION * info.compress_size + 4096:
            raise pickle.UnpicklingError(
                f"member {name} claims to unpack from {info.compress_size} to {info.file_size} bytes; refused"
            )
        if info.compress_size > self._size:
            raise pickle.UnpicklingError(
                f"member {name} claims {info.compress_size} of the file's {self._size} bytes; refused"
            )
        return info.file_size

    def read(self, name: str) -> bytes:
        if self._last[0] != name:
            self.size(name)
            self._last = ("", b"")
            self._last = (name, self._archive.read(name))
        return self._last[1]


class Storage(NamedTuple):
    """Numbers in a member of the archive, of which tensors are views."""

    members: _Members
    member: str
    type_name: str

    @property
    def item_bytes(self) -> int:
        """Bytes of a number."""
        return _STORAGE_DTYPES[self.type_name].itemsize

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return self.members.size(self.member) // self.item_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.size * self.item_bytes

    def read(self) -> np.ndarray:
        """Its numbers; bfloat16 as float32."""
        data = self.members.read(self.member)
        dtype = _STORAGE_DTYPES[self.type_name]
        values = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        if self.type_name == _BFLOAT16:
            values = (values.astype("<u4") << 16).view("<f4")
        return values


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet.

    Attributes:
        storage: where its numbers lie.
        offset: of its first, in numbers.
        shape: its shape.
        strides: steps along each axis, in numbers.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array that `read` gives."""
        return np.dtype(
            "<f4" if self.storage.type_name == _BFLOAT16 else _STORAGE_DTYPES[self.storage.type_name]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers in the file."""
        return math.prod(self.shape) * self.storage.item_bytes

    def read(self) -> np.ndarray:
        """Read it, while its file is open: a read-only view of what was read.

        Raises:
            ModelError: the file is damaged.
        """
        with _reading(self.storage.members.path):
            values = self.storage.read()
            steps = tuple(step * values.itemsize for step in self.strides)
            return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps, writeable=False)


@contextlib.contextmanager
def open_torch_file(path: str | Path) -> Iterator[Any]:
    """The object that `torch.save` wrote, its tensors as `StoredTensor`, which can be read until this is left.

    Raises:
        ModelError: not such a file, truncated, or holding anything but tensors and plain containers.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with _reading(path):
            members = _Members(stack.enter_context(zipfile.ZipFile(path)), path)
            saved = _read_description(members)
        yield saved


def read_torch_file(path: str | Path) -> Any:
    """Read the object that `torch.save` wrote, its tensors as NumPy arrays.

    Raises:
        ModelError: as of `open_torch_file`; or its tensors have many times the numbers that are in it.
    """
    with open_torch_file(path) as saved:
        tensors = _tensors_in(saved)
        claimed, there = sum(tensor.nbytes for tensor in tensors), stored_bytes(tensors)
        if claimed > MAX_SHARING * there:
            raise ModelError(f"{path}: its tensors claim {claimed} bytes of {there}; refused")
        with _reading(Path(path)):
            return _with_arrays(saved, {})


def stored_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes in the storages that tensors are views of, each counted once."""
    return sum(storage.nbytes for storage in {tensor.storage for tensor in tensors})


def _tensors_in(saved: Any) -> list[StoredTensor]:
    """The tensors in an object of plain containers, each once."""
    seen: dict[int, Any] = {}
    waiting = [saved]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple) and not isinstance(value, StoredTensor):
                waiting += value
    return [value for value in seen.values() if isinstance(value, StoredTensor)]


def _with_arrays(value: Any, done: dict[int, Any]) -> Any:
    """Plain containers with arrays for tensors; what is there twice is made once."""
    if id(value) in done:
        return done[id(value)]
    made: Any = value
    match value:
        case StoredTensor():
            made = np.array(value.read())
        case dict():
            made = done[id(value)] = {}
            made.update((key, _with_arrays(item, done)) for key, item in value.items())
        case list():
            made = done[id(value)] = []
            made.extend(_with_arrays(item, done) for item in value)
        case tuple():
            made = tuple(_with_arrays(item, done) for item in value)
    done[id(value)] = made
    return made


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says of whatever goes wrong with a file that it is damaged, or what else it is."""
    try:
        yield
    except FileNotFoundError:
        raise ModelError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder, not a PyTorch checkpoint") from None
    except _DAMAGE as error:
        reason = _other_kind(path) or str(error).split("\n", 1)[0] or type(error).__name__
        raise ModelError(f"{path}: not a PyTorch checkpoint, or a damaged one: {reason}") from None
    except ModelError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ModelError(f"{path}: its description of the tensors is damaged: {reason}") from None


def _other_kind(path: Path) -> str | None:
    """What a file is that is no zip archive, where its beginning tells."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_LEGACY_MAGIC))
    except OSError:
        return None
    if begin == _LEGACY_MAGIC:
        return "written by PyTorch before 1.6; load it with PyTorch and save it again"
    if begin[_SAFETENSORS_BRACE : _SAFETENSORS_BRACE + 1] == b"{":
        return "a safetensors file; give the folder that it and its configuration lie in"
    return None


def _read_description(members: _Members) -> Any:
    pickles = [name for name in members.names() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ModelError(
            f"{members.path}: a zip file, but not one that torch.save wrote (no single data.pkl in it)"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in members.names() and members.read(order).strip() != b"little":
        raise ModelError(f"{members.path}: saved on a big-endian machine, which is not supported")
    return _TensorUnpickler(members, root).load()


class _TensorUnpickler(pickle.Unpickler):
    """Resolves the names that tensors need to functions of our own, and no other name."""

    def __init__(self, members: _Members, root: str) -> None:
        description = members.read(f"{root}data.pkl")
        _check_sizes(description)
        super().__init__(io.BytesIO(description), encoding="utf-8")
        self._members = members
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which a checkpoint has no need of; refused")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _location, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not str(key).isalnum():
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        storage = Storage(self._members, f"{self._root}data/{key}", storage_type.name)
        if storage.size < count:
            raise pickle.UnpicklingError(f"storage {key} holds {storage.size} of {count} numbers")
        return storage


def _check_sizes(description: bytes) -> None:
    """Refuse lengths and memo numbers beyond the pickle's own: the unpickler would allocate memory for them first."""
    with warnings.catch_warnings():
        # Of escapes in a damaged name, which says nothing to the user.
        warnings.simplefilter("ignore", DeprecationWarning)
        for opcode, argument, _ in pickletools.genops(description):  # raises ValueError for such a length
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(description):
                raise pickle.UnpicklingError(
                    f"its memo number {argument} is beyond its {len(description)} bytes"
                )


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    shape, stride = tuple(shape), tuple(stride)
    if not all(type(n) is int for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride} from {offset}")
    if len(shape) != len(stride) or offset < 0 or any(n < 0 for n in (*shape, *stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches beyond its {storage.size} numbers")
    if math.prod(shape) > storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} over {storage.size} numbers")
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor: StoredTensor, *_: object) -> StoredTensor:
    return tensor
