"""A model as one `.npz` file, which NumPy alone reads.

    format          int64: 1
    config          text: the shape, as JSON
    storage         text: float32, float16, bfloat16 or int8: what matrices are kept in
    vocabulary      text [V]: the tokens in the order of their ids; absent where the model is of another vocabulary
    NAME            a parameter by its path (`wte.embedding`, `h_0.attn.c_attn.kernel`), as model folders name them
    NAME.int8_scale float32: beside each kernel of int8, what its channels are multiplied by

Kernels are [in, out], `c_attn` holds queries, keys and values side by side: [D, 3 D]. Vectors (LayerNorm, biases) are
float32 always. NumPy knows no bfloat16: such a matrix is kept as uint16, the upper half of each float32, rounded to
the nearest, ties to even. int8 is for kernels, each output channel (a column) over its largest magnitude, [1, out];
embeddings are float16 beside it, for they lose most in int8 and are a small part. Without this package:

    file = np.load("model.npz", allow_pickle=False)
    config, tokens = json.loads(str(file["config"])), file["vocabulary"].tolist()
    kernel = file["h_0.mlp.c_fc.kernel"].astype(np.float32)                                 # float32, float16
    kernel = (file["h_0.mlp.c_fc.kernel"].astype(np.uint32) << 16).view(np.float32)         # bfloat16
    kernel = file["h_0.mlp.c_fc.kernel"] * file["h_0.mlp.c_fc.kernel.int8_scale"]           # int8

The members are not compressed: that would take 7 % off float32 and a fifth off bfloat16, and cost more than a
second for ten million parameters. A compressed file is read all the same.
"""

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from types import UnionType
from typing import IO, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.files import new_file
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.model import Model
from crystallm_jax.models.parameters import named_arrays, params_from_named
from crystallm_jax.models.published_names import parameter_table
from crystallm_jax.models.tokens import check_tokens

StoredType = Literal["float32", "float16", "bfloat16", "int8"]

FORMAT = 1
SCALE_SUFFIX = ".int8_scale"
_STORED_AS: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
_MEMBER = ".npy"
_DESCRIPTION = ("format", "config", "storage")
_VOCABULARY = "vocabulary"
# What of the shape is kept: how a training run lays the model out is the run's affair.
_CONFIG_KEYS = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "vocab_size",
    "bias",
    "dropout",
    "attention_dropout",
    "dtype",
)
# Bytes that a description may take, and how much a file may unpack to: weights hardly compress.
_LONGEST_DESCRIPTION = 1 << 20
_MOST_EXPANSION, _ALLOWANCE = 8, 1 << 20
_LARGEST_INT8 = 127
# What zipfile, zlib and NumPy's reader of headers raise on a file that is none, is cut short or was tampered with.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    LookupError,
    ValueError,
    TypeError,
    OverflowError,
    SyntaxError,
    TokenError,
    MemoryError,
)


def write_npz(path: str | Path, weights: Model, *, dtype: StoredType = "float32") -> None:
    """Write a model as one file; it appears under its name when it is complete.

    Args:
        path: the file; one that is there is replaced.
        weights: the model; what is known of its training is left out.
        dtype: of the matrices in the file; bfloat16 and float16 halve it, int8 quarters it.

    Raises:
        ModelError: a number is not finite or not within the range of `dtype`, or the file cannot be written.
    """
    path = Path(path)
    if dtype not in _STORED_AS:
        raise ModelError(f"{path}: dtype={dtype!r}: choose from {', '.join(_STORED_AS)}")
    arrays = _described(weights.config, dtype)
    for name, value in named_arrays(weights.params, weights.config).items():
        if not np.isfinite(value).all():
            raise ModelError(f"{path}: tensor {name} holds numbers that are not finite: not written")
        stored = packed(name, np.asarray(value, np.float32), dtype)
        if not np.isfinite(unpacked(name, stored)).all():
            raise ModelError(
                f"{path}: tensor {name} holds numbers beyond the range of {dtype}: choose float32"
            )
        arrays |= stored
    with (
        new_file(path, ModelError) as partial,
        zipfile.ZipFile(partial, "w") as archive,
    ):
        for name, value in arrays.items():
            with archive.open(name + _MEMBER, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def read_npz(path: str | Path) -> Model:
    """Read a model that `write_npz` wrote; every tensor is checked by name, type and shape before it is unpacked.

    Raises:
        ModelError: not such a file, damaged, of another vocabulary, a tensor missing, left over or of another shape,
            or one that claims to unpack to far more than it can.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder, not an .npz file") from None
    except ModelError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: not a model in an .npz file, or a damaged one: {reason}") from None


def packed(name: str, value: np.ndarray, storage: StoredType) -> dict[str, np.ndarray]:
    """A float32 parameter as it is kept, by the names of its members."""
    kept_as = _kept_as(name, value.ndim, storage)
    if kept_as == "float32":
        return {name: np.ascontiguousarray(value, "<f4")}
    if kept_as == "float16":
        with np.errstate(over="ignore"):
            return {name: value.astype("<f2")}
    if kept_as == "bfloat16":
        bits = np.ascontiguousarray(value, "<f4").view("<u4")
        # Half of the last place that is kept, less a bit where that place is even already.
        return {name: ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype("<u2")}
    # Clipping channels so that the squared error is least takes off 1 % of it and gives no better logits.
    largest = np.abs(value).max(axis=0, keepdims=True)
    scale = np.where(largest > 0, largest / _LARGEST_INT8, 1).astype("<f4")
    return {name: np.rint(value / scale).astype("i1"), name + SCALE_SUFFIX: scale}


def unpacked(name: str, stored: Mapping[str, np.ndarray]) -> np.ndarray:
    """The float32 parameter that was packed."""
    value = stored[name]
    if value.dtype == np.uint16:
        return (value.astype(np.uint32) << 16).view(np.float32)
    if value.dtype == np.int8:
        return value * stored[name + SCALE_SUFFIX]
    return value.astype(np.float32)


def _kept_as(name: str, axes: int, storage: StoredType) -> StoredType:
    """How a parameter is kept in a file of such a storage.

    Embeddings in int8 would double what the logits lose: that of the tokens is the head too.
    """
    if axes < 2:
        return "float32"
    return "float16" if storage == "int8" and name.endswith(".embedding") else storage


def _described(config: ModelConfig, storage: StoredType) -> dict[str, np.ndarray]:
    shape = {key: getattr(config, key) for key in _CONFIG_KEYS}
    arrays = {
        "format": np.array(FORMAT, "<i8"),
        "config": np.array(json.dumps(shape)),
        "storage": np.array(storage),
    }
    return arrays | ({_VOCABULARY: np.array(TOKENS)} if config.vocab_size == len(TOKENS) else {})


def _read(archive: zipfile.ZipFile, path: Path) -> Model:
    members = _members(archive, path)
    for name in _DESCRIPTION:
        if name not in members:
            raise ModelError(f"{path}: not a model: it has no {name!r}; `crystallm convert` writes one")
    number = _text(archive, members.pop("format"))
    if number != str(FORMAT):
        raise ModelError(
            f"{path}: its format is {number!r}; this version reads {FORMAT}: install a newer one"
        )
    config = _config(_text(archive, members.pop("config")), path)
    storage = _storage(_text(archive, members.pop("storage")), path)
    if _VOCABULARY in members:
        _check_vocabulary(_small(archive, members.pop(_VOCABULARY)), config, path)
    if config.n_layer > len(members):
        raise ModelError(
            f"{path}: {len(members)} tensors are too few for the {config.n_layer} layers that it states"
        )
    expected = _expected(config, storage)
    if missing := expected.keys() - members.keys():
        raise ModelError(f"{path}: tensor {min(missing)} is missing")
    if left := members.keys() - expected.keys():
        raise ModelError(f"{path}: tensors that no parameter takes: {', '.join(sorted(left)[:5])}")
    # All headers first: a file that lies is refused before anything is unpacked.
    for name, (dtype, shape) in expected.items():
        _check_header(archive, members[name], place=f"{path}: tensor {name}", dtype=dtype, shape=shape)
    named = {}
    for name in (".".join(entry.path) for entry in parameter_table(config).values()):
        wanted = (name, name + SCALE_SUFFIX)
        stored = {one: _array(archive, members[one]) for one in wanted if one in expected}
        named[name] = unpacked(name, stored)
    return Model(config, params_from_named(named, config, place=str(path)))


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by name, once it is sure that they can be what they claim."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(_MEMBER)
        if name in members or name == info.filename:
            raise ModelError(f"{path}: holds {info.filename!r} twice, or what is no array: not a model")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelError(
                f"{path}: {info.filename!r} is compressed in a way that NumPy does not use; refused"
            )
        members[name] = info
    claimed, real = sum(info.file_size for info in members.values()), path.stat().st_size
    if claimed > _MOST_EXPANSION * real + _ALLOWANCE:
        raise ModelError(f"{path}: claims to unpack from {real:,} to {claimed:,} bytes; refused")
    return members


def _expected(config: ModelConfig, storage: StoredType) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of every member that holds parameters."""
    expected: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for entry in parameter_table(config).values():
        name, shape = ".".join(entry.path), entry.shape
        kept_as = _kept_as(name, len(shape), storage)
        expected[name] = _STORED_AS[kept_as], shape
        if kept_as == "int8":
            expected[name + SCALE_SUFFIX] = _STORED_AS["float32"], (1, shape[1])
    return expected


def _check_header(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    *,
    place: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> None:
    with archive.open(info) as file:
        found_shape, found = _header(file)
        begin = file.tell()
    if found != dtype:
        raise ModelError(f"{place} is of type {found}; its storage asks for {dtype}")
    if found_shape != shape:
        raise ModelError(f"{place} has shape {found_shape}; the configuration asks for {shape}")
    if info.file_size != begin + math.prod(shape) * dtype.itemsize:
        raise ModelError(f"{place} has {info.file_size:,} bytes, which do not fit its shape {shape}: damaged")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return tuple(int(length) for length in shape), dtype


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        value: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        # The checksum is compared at the end.
        file.read(1)
    return value


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.file_size > _LONGEST_DESCRIPTION:
        raise ValueError(f"{info.filename} claims {info.file_size:,} bytes")
    with archive.open(info) as file:
        shape, dtype = _header(file)
        if math.prod(shape) * dtype.itemsize > _LONGEST_DESCRIPTION or min(shape, default=0) < 0:
            raise ValueError(f"{info.filename} claims to be of shape {shape}")
    return _array(archive, info)


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    return str(_small(archive, info))


def _storage(text: str, path: Path) -> StoredType:
    for known in get_args(StoredType):
        if text == known:
            return cast("StoredType", known)
    raise ModelError(f"{path}: its storage is {text!r}; known are {', '.join(_STORED_AS)}")


def _config(text: str, path: Path) -> ModelConfig:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"{text[:40]!r} is no table of settings")
        types = get_type_hints(ModelConfig)
        for key, value in values.items():
            if key not in _CONFIG_KEYS:
                raise ValueError(f"unknown key {key!r}")
            if not _is_of(value, types[key]):
                raise ValueError(f"{key}={value!r} is not of its type")
        return ModelConfig(**values)
    except (ValueError, RecursionError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: its configuration cannot be used: {reason}") from None


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type; a bool is no number, a whole number is a float too."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def _check_vocabulary(tokens: np.ndarray, config: ModelConfig, path: Path) -> None:
    if tokens.dtype.kind != "U" or tokens.shape != (config.vocab_size,):
        raise ModelError(
            f"{path}: its vocabulary is not a list of the {config.vocab_size} tokens of its configuration"
        )
    check_tokens(tokens.tolist(), place=str(path))
