"""Models in `.npz` files: what is written is read again, NumPy alone reads it, and what is damaged is refused."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.errors import ModelError
from crystallm_jax.model.config import ModelConfig
from crystallm_jax.models.model import Model
from crystallm_jax.models.npz import packed, read_npz, unpacked, write_npz
from crystallm_jax.models.parameters import named_arrays
from crystallm_jax.models.published_names import parameter_table

BIASED = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=371, bias=True, dtype="bfloat16")
KERNEL = "h_0.mlp.c_fc.kernel"


def _weights(config: ModelConfig = BIASED) -> Model:
    rng, params = np.random.default_rng(0), {}
    for entry in parameter_table(config).values():
        inner = params
        for part in entry.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[entry.path[-1]] = rng.normal(size=entry.held).astype(np.float32)
    return Model(config, params)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_npz(tmp_path / "model.npz", _weights())
    return tmp_path / "model.npz"


def _contents(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _refused(path: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_npz(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 127)]
)
def test_a_file_gives_back_what_was_written(dtype: Any, tolerance: float, tmp_path: Path) -> None:
    weights, path = _weights(), tmp_path / "deep" / "model.npz"
    write_npz(path, weights, dtype=dtype)
    read = read_npz(path)
    assert read.config == weights.config
    found = named_arrays(read.params, BIASED)
    for name, value in named_arrays(weights.params, BIASED).items():
        assert found[name].dtype == np.float32
        if value.ndim < 2:
            np.testing.assert_array_equal(found[name], value)
        else:
            assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max()
    assert read.params["h_0"]["attn"]["c_attn"]["kernel"].shape == (8, 3, 8)
    assert [one.name for one in path.parent.iterdir()] == ["model.npz"]


def test_numpy_alone_reads_a_file_as_its_description_says(tmp_path: Path) -> None:
    kernel = _weights().params["h_0"]["mlp"]["c_fc"]["kernel"]
    made: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
        "float32": lambda file: file[KERNEL].astype(np.float32),
        "float16": lambda file: file[KERNEL].astype(np.float32),
        "bfloat16": lambda file: (file[KERNEL].astype(np.uint32) << 16).view(np.float32),
        "int8": lambda file: file[KERNEL] * file[f"{KERNEL}.int8_scale"],
    }
    for dtype, unpack in made.items():
        write_npz(tmp_path / "model.npz", _weights(), dtype=dtype)  # type: ignore[arg-type]
        file = _contents(tmp_path / "model.npz")
        assert unpack(file).dtype == np.float32
        np.testing.assert_allclose(unpack(file), kernel, atol=0.02)
        assert json.loads(str(file["config"]))["n_layer"] == 2
        assert str(file["storage"]) == dtype
        assert tuple(file["vocabulary"].tolist()) == TOKENS
        assert file["h_0.attn.c_attn.kernel"].shape == (8, 24)


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", _weights())
    write_npz(tmp_path / "b.npz", read_npz(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x00000000]], np.uint32)
    stored = packed(KERNEL, bits.view(np.float32), "bfloat16")
    assert stored[KERNEL].tolist() == [[0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0]]
    assert unpacked(KERNEL, stored).view(np.uint32).tolist() == [
        [n << 16 for n in stored[KERNEL][0].tolist()]
    ]


def test_int8_scales_each_column_of_kernels_and_keeps_embeddings_finer() -> None:
    value = np.array([[1.0, 0.0, -200.0], [-0.5, 0.0, 100.0]], np.float32)
    kernel, table = packed("c.kernel", value, "int8"), packed("wte.embedding", value, "int8")
    assert kernel["c.kernel.int8_scale"].shape == (1, 3)
    assert kernel["c.kernel"].tolist() == [[127, 0, -127], [-64, 0, 64]]
    np.testing.assert_array_equal(unpacked("c.kernel", kernel)[:, 1], 0)
    assert {name: stored.dtype for name, stored in table.items()} == {"wte.embedding": np.dtype("<f2")}


def test_models_of_another_vocabulary_carry_none(tmp_path: Path) -> None:
    config = replace(BIASED, vocab_size=11, bias=False)
    write_npz(tmp_path / "model.npz", _weights(config))
    assert "vocabulary" not in _contents(tmp_path / "model.npz")
    assert read_npz(tmp_path / "model.npz").config == config


def test_a_compressed_file_is_read(file: Path) -> None:
    np.savez_compressed(file, **_contents(file))
    assert read_npz(file).config == BIASED


def test_what_a_type_cannot_hold_is_not_written(tmp_path: Path) -> None:
    weights = _weights()
    weights.params["wte"]["embedding"][0, 0] = 1e6
    with pytest.raises(ModelError, match=r"wte.embedding .* float16"):
        write_npz(tmp_path / "model.npz", weights, dtype="float16")
    weights.params["wte"]["embedding"][0, 0] = np.nan
    for dtype in ("float32", "bfloat16", "int8"):
        with pytest.raises(ModelError, match=r"wte.embedding"):
            write_npz(tmp_path / "model.npz", weights, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"float8.*bfloat16"):
        write_npz(tmp_path / "model.npz", weights, dtype="float8")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.npz").mkdir()
    with pytest.raises(ModelError, match="cannot be written"):
        write_npz(tmp_path / "model.npz", _weights())
    assert list(tmp_path.iterdir()) == [tmp_path / "model.npz"]


def test_tensors_that_are_not_what_the_configuration_says_are_refused(file: Path) -> None:
    contents = _contents(file)

    def changed(*parts: str, without: str = "", **arrays: Any) -> None:
        kept = {name: value for name, value in contents.items() if name != without}
        np.savez(file, **(kept | arrays))
        _refused(file, *parts)

    changed("ln_f.scale", "missing", without="ln_f.scale")
    changed("no 'config'", without="config")
    changed("h_9.x", "no parameter takes", **{"h_9.x": np.zeros(2, np.float32)})
    changed(KERNEL, "(8, 31)", "(8, 32)", **{KERNEL: contents[KERNEL][:, :31]})
    changed(KERNEL, "float64", **{KERNEL: contents[KERNEL].astype(np.float64)})
    changed(KERNEL, "not finite", **{KERNEL: np.full_like(contents[KERNEL], np.nan)})
    changed("its format is '2'", format=np.array(2))
    changed("'float8'", storage=np.array("float8"))
    changed("int8_scale is missing", storage=np.array("int8"))
    changed("type float32", "float16", storage=np.array("float16"))
    changed("Object arrays", storage=np.array({"a": 1}))
    changed("token 3", vocabulary=np.array([*TOKENS[:3], "Xx", *TOKENS[4:]]))
    changed("371 tokens", vocabulary=np.array(TOKENS[:-1]))
    changed("371 tokens", vocabulary=np.arange(371))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("format.npy", b"")
    _refused(file, "twice")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"n_layer": 10**9}, "too few"),
        ({"n_embd": 10**9}, "(371, 8)"),
        ({"n_layer": 2.0}, "n_layer=2.0"),
        ({"n_head": 3}, "multiple"),
        ({"bias": 1}, "bias=1"),
        ({"dropout": 2}, "dropout=2"),
        ({"dtype": "float64"}, "float64"),
        ({"n_layers": 2}, "n_layers"),
        ([1], "no table"),
        ("[" * 100_000, "configuration"),
    ],
)
def test_configurations_that_lie_are_refused(settings: Any, part: str, file: Path) -> None:
    contents = _contents(file)
    shape = json.loads(str(contents["config"]))
    text = json.dumps(shape | settings if isinstance(settings, dict) else settings)
    np.savez(file, **(contents | {"config": np.array(settings if isinstance(settings, str) else text)}))
    _refused(file, part)


def test_a_file_that_would_unpack_to_far_more_is_refused_unread(tmp_path: Path) -> None:
    config = replace(BIASED, n_embd=512, block_size=2**13, vocab_size=11)
    path = tmp_path / "bomb.npz"
    write_npz(path, _weights(replace(config, n_layer=1)))
    contents = {
        name: np.zeros_like(value) if "." in name else value for name, value in _contents(path).items()
    }
    np.savez_compressed(path, **contents)
    assert path.stat().st_size < 1 << 17
    _refused(path, "claims to unpack")


def test_what_is_no_such_file_is_refused(tmp_path: Path, file: Path) -> None:
    _refused(tmp_path / "none.npz", "no such file")
    _refused(tmp_path, "is a folder")
    (tmp_path / "empty.npz").write_bytes(b"")
    _refused(tmp_path / "empty.npz", "not a model")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n.")
    _refused(tmp_path / "other.npz", "data.pkl")
    np.savez(tmp_path / "plain.npz", x=np.zeros(3))
    _refused(tmp_path / "plain.npz", "no 'format'")
    with zipfile.ZipFile(tmp_path / "packed.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("format.npy", b"x" * 100)
    _refused(tmp_path / "packed.npz", "compressed")


def test_whatever_is_damaged_ends_in_one_line(tmp_path: Path) -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=2, block_size=2, vocab_size=3)
    write_npz(tmp_path / "whole.npz", _weights(config), dtype="int8")
    whole, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "damaged.npz"
    rng = np.random.default_rng(1)
    messages = []
    for _ in range(400):
        content = bytearray(whole)
        if rng.random() < 0.2:
            content = content[: rng.integers(len(whole))]
        else:
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_npz(path)
        except ModelError as error:
            messages.append(str(error))
    # What is left are bytes that say nothing, such as times.
    assert len(messages) > 200
    assert all(str(path) in message and "\n" not in message for message in messages)
