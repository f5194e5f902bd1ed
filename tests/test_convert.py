"""Published checkpoints: read without PyTorch, and refused where they only pretend to be one."""

import dataclasses
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystallm_jax.errors import CrystallmError, ModelError
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.models import read_published
from crystallm_jax.models.kinds import read_model
from crystallm_jax.models.published import read_published_training
from crystallm_jax.models.published_names import optimizer_order
from crystallm_jax.models.torch_file import read_torch_file

STORAGES = {
    "f8": "Double",
    "f4": "Float",
    "f2": "Half",
    "i8": "Long",
    "i4": "Int",
    "i1": "Char",
    "u1": "Byte",
    "b1": "Bool",
}
PLAIN = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11)
BIASED = dataclasses.replace(PLAIN, bias=True)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """The opcodes that build a value, as `torch.save` would write them; arrays go into `storages`, bytes stay."""
    match value:
        case bytes():
            opcodes = value
        case str():
            opcodes = _text(value)
        case None:
            opcodes = b"N"
        case bool():
            opcodes = b"\x88" if value else b"\x89"
        case int():
            opcodes = b"J" + struct.pack("<i", value)
        case float():
            opcodes = b"G" + struct.pack(">d", value)
        case list():
            opcodes = b"](" + b"".join(_pickled(part, storages) for part in value) + b"e"
        case dict():
            items = (_pickled(part, storages) for item in value.items() for part in item)
            opcodes = b"}(" + b"".join(items) + b"u"
        case np.ndarray():
            base = value if value.base is None else value.base
            storages.append(base)
            opcodes = _tensor(
                STORAGES[value.dtype.str[1:]],
                key=str(len(storages) - 1),
                count=base.size,
                shape=value.shape,
                strides=[step // value.itemsize for step in value.strides],
            )
    return opcodes


def _tensor(storage: str, *, key: str, count: int, shape: Any, strides: Any, offset: int = 0) -> bytes:
    """The opcodes of one tensor over a storage."""
    kind = b"ctorch\n" + storage.encode() + b"Storage\n"
    saved = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _pickled(count, [])) + b"Q"
    numbers = [_tuple(*(_pickled(n, []) for n in sizes)) for sizes in (shape, strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        + _tuple(saved, _pickled(offset, []), *numbers, b"\x89", hooks)
        + b"R"
    )


def _save(
    path: Path, value: Any, *, compression: int = zipfile.ZIP_STORED, byteorder: str = "little"
) -> Path:
    """Write what `torch.save` would."""
    storages: list[np.ndarray] = []
    description = b"\x80\x02" + _pickled(value, storages) + b"."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/byteorder", byteorder)
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def _published_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under the published names, in the published shapes, written out by hand."""
    rng = np.random.default_rng(seed)
    D = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte": (config.vocab_size, D), "wpe": (config.block_size, D)}
    for layer in range(config.n_layer):
        shapes |= {
            f"h.{layer}.ln_1": (D,),
            f"h.{layer}.attn.c_attn": (3 * D, D),
            f"h.{layer}.attn.c_proj": (D, D),
            f"h.{layer}.ln_2": (D,),
            f"h.{layer}.mlp.c_fc": (4 * D, D),
            f"h.{layer}.mlp.c_proj": (D, 4 * D),
        }
    shapes["ln_f"] = (D,)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"transformer.{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        if config.bias and name not in {"wte", "wpe"}:
            tensors[f"transformer.{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def _checkpoint(config: ModelConfig, tensors: dict[str, np.ndarray], **changes: Any) -> dict[str, Any]:
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
    model_args = {name: getattr(config, name) for name in names}
    best = np.array(1.5, np.float32)
    return {
        "model": tensors,
        "optimizer": {},
        "model_args": model_args,
        "iter_num": 7,
        "best_val_loss": best,
    } | changes


def _refused(read: Callable[[], Any], *parts: str) -> str:
    with pytest.raises(CrystallmError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_a_published_checkpoint_becomes_parameters_of_ours(
    config: ModelConfig, prefix: str, tmp_path: Path
) -> None:
    tensors = _published_tensors(config)
    saved = _checkpoint(
        dataclasses.replace(config, dropout=0.25), {prefix + name: value for name, value in tensors.items()}
    )
    read = read_published(_save(tmp_path / "ckpt.pt", saved))
    assert read.config == dataclasses.replace(config, dropout=0.25)
    assert (read.training.step, read.training.best_val_loss) == (7, 1.5)
    for place, name, ours in (
        (read.params["wte"], "embedding", tensors["transformer.wte.weight"]),
        (read.params["wpe"], "embedding", tensors["transformer.wpe.weight"]),
        (read.params["ln_f"], "scale", tensors["transformer.ln_f.weight"]),
        (read.params["h_1"]["ln_2"], "scale", tensors["transformer.h.1.ln_2.weight"]),
        (read.params["h_0"]["attn"]["c_attn"], "kernel", tensors["transformer.h.0.attn.c_attn.weight"].T),
        (read.params["h_1"]["mlp"]["c_proj"], "kernel", tensors["transformer.h.1.mlp.c_proj.weight"].T),
    ):
        np.testing.assert_array_equal(place[name].reshape(ours.shape), ours)
    if config.bias:
        np.testing.assert_array_equal(
            read.params["h_1"]["mlp"]["c_fc"]["bias"], tensors["transformer.h.1.mlp.c_fc.bias"]
        )
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), read.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )


def test_golden_checkpoints_are_read_without_torch(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would now fail
    for path in sorted(golden.glob("*/**/*ckpt.pt")):
        read = read_published(path)
        assert read.config.n_embd == 32
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read.params))
    saved = read_torch_file(golden / "train" / "final_ckpt.pt")
    assert {"model", "optimizer", "model_args", "iter_num"} <= saved.keys()
    assert len(saved["optimizer"]["state"]) == 15


@pytest.mark.parametrize("dtype", sorted(STORAGES))
def test_tensors_of_every_type_are_read(dtype: str, tmp_path: Path) -> None:
    value = (np.arange(6) % 2 if dtype == "b1" else np.arange(6)).astype(dtype).reshape(2, 3)
    read = read_torch_file(_save(tmp_path / "x.pt", {"x": value, "none": None}))
    assert read["x"].dtype == value.dtype
    np.testing.assert_array_equal(read["x"], value)


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    value = np.asarray(jnp.array([1.5, -2.25, 3e38], jnp.bfloat16))
    halves = value.view(np.uint16)
    tensor = _tensor("BFloat16", key="0", count=3, shape=[3], strides=[1])
    path = tmp_path / "x.pt"
    _save(path, {"halves": halves.view("u1"), "x": tensor})
    np.testing.assert_array_equal(read_torch_file(path)["x"], value.astype(np.float32))


def test_views_of_a_storage_are_read_as_they_are_strided(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32)
    parts = {
        "base": base,
        "column": _tensor("Float", key="0", count=12, shape=[3], strides=[4], offset=1),
        "transposed": _tensor("Float", key="0", count=12, shape=[4, 3], strides=[1, 4]),
        "spread": _tensor("Float", key="0", count=12, shape=[2, 5], strides=[0, 1], offset=7),
        "empty": _tensor("Float", key="0", count=12, shape=[0, 3], strides=[3, 1]),
        "parameter": b"ctorch._utils\n_rebuild_parameter\n"
        + _tuple(_tensor("Float", key="0", count=12, shape=[12], strides=[1]), b"\x88", b"}")
        + b"R",
    }
    read = read_torch_file(_save(tmp_path / "x.pt", parts))
    np.testing.assert_array_equal(read["column"], [1, 5, 9])
    np.testing.assert_array_equal(read["transposed"], base.reshape(3, 4).T)
    np.testing.assert_array_equal(read["spread"], [base[7:], base[7:]])
    np.testing.assert_array_equal(read["parameter"], base)
    assert read["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda command: b"cos\nsystem\n" + _tuple(_text(command)) + b"R",
        lambda command: b"cposix\nsystem\n" + _tuple(_text(command)) + b"R",
        lambda command: b"csubprocess\ngetoutput\n" + _tuple(_text(command)) + b"R",
        lambda command: (
            b"c__builtin__\neval\n" + _tuple(_text(f"__import__('os').system({command!r})")) + b"R"
        ),
        lambda command: _text("os") + _text("system") + b"\x93" + _tuple(_text(command)) + b"R",
        lambda command: b"(" + _text(command) + b"ios\nsystem\n",
        lambda command: b"ctorch\nload\n" + _tuple(_text(command)) + b"R",
        lambda command: b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
        lambda command: b"ccollections\nOrderedDict.__init__\n",
        lambda command: b"ctorch\nStorage\n",
    ],
)
def test_a_pickle_that_calls_anything_else_is_refused_and_not_run(
    call: Callable[[str], bytes], tmp_path: Path
) -> None:
    trap = tmp_path / "ran"
    path = _save(tmp_path / "hostile.pt", {"model": call(f"touch {trap}")})
    _refused(lambda: read_torch_file(path), str(path), "refused")
    _refused(lambda: read_model(path), "refused")
    assert not trap.exists()


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor("Float", key="0", count=4, shape=[5], strides=[1]),
        _tensor("Float", key="0", count=4, shape=[2], strides=[4]),
        _tensor("Float", key="0", count=4, shape=[2], strides=[-1], offset=1),
        _tensor("Float", key="0", count=4, shape=[1], strides=[1], offset=-1),
        _tensor("Float", key="0", count=4, shape=[1], strides=[1], offset=4),
        _tensor("Float", key="0", count=4, shape=[-1], strides=[1]),
        _tensor("Float", key="0", count=4, shape=[2, 2], strides=[1]),
        _tensor("Float", key="0", count=4, shape=[2**30, 2**30], strides=[0, 0]),
        _tensor("Float", key="0", count=5, shape=[2], strides=[1]),
        _tensor("Float", key="9", count=4, shape=[2], strides=[1]),
        _tensor("Float", key="../data.pkl", count=1, shape=[1], strides=[1]),
        _tensor("Complex", key="0", count=1, shape=[1], strides=[1]),
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"NQ",
        b"(" * 100_000 + b"N" + b"t" * 100_000 + b"Q",
        b"\x82\x01",
    ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(tensor: bytes, tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", {"base": np.arange(4, dtype=np.float32), "x": tensor})
    _refused(lambda: read_torch_file(path), str(path))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Nr\xff\xff\xff\xff",
        b"\x8d" + struct.pack("<Q", 1 << 40) + b"x",
        b"\x8e" + struct.pack("<Q", 1 << 62) + b"x",
        b"\x96" + struct.pack("<Q", 1 << 36) + b"x",
        b"T\xff\xff\xff\x7fx",
    ],
)
def test_a_pickle_that_asks_for_more_memory_than_it_fills_is_refused(opcodes: bytes, tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", opcodes)
    _refused(lambda: read_torch_file(path), str(path))


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "byteorder"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(member: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(_save(path, np.zeros(4, np.float32))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"archive/{member}"] += b"\0" * (1 << 24)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    _refused(lambda: read_torch_file(path), str(path), member, "refused")


def test_a_packed_checkpoint_is_read(tmp_path: Path) -> None:
    saved = _checkpoint(PLAIN, _published_tensors(PLAIN))
    path = _save(tmp_path / "x.pt", saved, compression=zipfile.ZIP_DEFLATED)
    assert read_published(path).config == PLAIN
    assert read_model(path).config == PLAIN


def test_a_damaged_checkpoint_is_refused_or_read_whole_but_never_fails_otherwise(tmp_path: Path) -> None:
    saved = _checkpoint(PLAIN, _published_tensors(PLAIN), optimizer=_optimizer(PLAIN, 3))
    path = _save(tmp_path / "x.pt", saved, compression=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_published_training(path)
        except ModelError as error:
            refusals.append(str(error))
    assert len(refusals) > 200
    assert all(message.startswith(str(path)) and "\n" not in message for message in refusals)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(kept: float, tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", _checkpoint(PLAIN, _published_tensors(PLAIN)))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    _refused(lambda: read_model(path), str(path), "not a PyTorch checkpoint")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("a model, honestly")
    _refused(lambda: read_model(text), str(text), "not a PyTorch checkpoint")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    _refused(lambda: read_model(tmp_path / "other.zip"), "no single data.pkl")
    _refused(lambda: read_torch_file(tmp_path), "is a folder")
    _refused(lambda: read_torch_file(tmp_path / "none.pt"), "no such checkpoint")
    big_endian = _save(tmp_path / "big.pt", {"x": np.arange(3, dtype=np.float32)}, byteorder="big")
    _refused(lambda: read_torch_file(big_endian), "big-endian")


@pytest.mark.parametrize("saved", [7, {"state_dict": {}}, {"model": {}}, {"model": 3, "model_args": {}}])
def test_a_file_of_something_else_than_a_checkpoint_is_refused(saved: Any, tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", saved)
    _refused(lambda: read_published(path), str(path), "model")


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"n_layer": None}, ["model_args"]),
        ({"n_embd": 9}, ["n_embd=9"]),
        ({"n_layer": 3}, ["transformer.h.2.ln_1.weight", "missing"]),
        ({"n_layer": 2**31 - 1}, ["2147483647 layers"]),
        ({"n_layer": 1}, ["transformer.h.1.", "no parameter"]),
        ({"bias": True}, ["transformer.h.0.ln_1.bias", "missing"]),
        ({"vocab_size": 12}, ["transformer.wte.weight", "(11, 8)", "(12, 8)"]),
        ({"block_size": 5}, ["transformer.wpe.weight", "(6, 8)", "(5, 8)"]),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(
    changed: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    saved = _checkpoint(PLAIN, _published_tensors(PLAIN))
    saved["model_args"] |= changed
    path = _save(tmp_path / "x.pt", saved)
    _refused(lambda: read_published(path), str(path), *parts)


def test_model_args_without_a_key_are_refused_with_it(tmp_path: Path) -> None:
    saved = _checkpoint(PLAIN, _published_tensors(PLAIN))
    del saved["model_args"]["n_embd"]
    path = _save(tmp_path / "x.pt", saved)
    _refused(lambda: read_published(path), str(path), "lacks n_embd")


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"transformer.h.0.attn.bias": np.zeros(3)}, ["transformer.h.0.attn.bias", "no parameter"]),
        ({"transformer.ln_f.weight": None}, ["transformer.ln_f.weight", "missing"]),
        ({"transformer.ln_f.weight": [1.0] * 8}, ["transformer.ln_f.weight", "no tensor"]),
        ({"transformer.h.0.mlp.c_fc.weight": np.zeros((8, 32))}, ["c_fc.weight", "(8, 32)", "(32, 8)"]),
        ({"lm_head.weight": np.zeros((11, 8), np.float32)}, ["tied"]),
        ({"transformer.ln_f.weight": np.ones(8, np.int8)}, ["transformer.ln_f.weight", "int8"]),
        ({"transformer.ln_f.weight": np.array([1] * 7 + [np.nan], "f4")}, ["ln_f.weight", "not finite"]),
        ({"transformer.ln_f.weight": np.full(8, 1e300)}, ["ln_f.weight", "not finite"]),
        ({"module.transformer.ln_f.weight": np.ones(8, np.float32)}, ["ln_f.weight", "twice"]),
        (
            {"transformer.ln_f.weight": ("Float", {"key": "0", "count": 88, "shape": [8], "strides": [1]})},
            ["share"],
        ),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(
    changed: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    tensors: dict[str, Any] = _published_tensors(PLAIN)
    for name, value in changed.items():
        tensors[name] = _tensor(value[0], **value[1]) if isinstance(value, tuple) else value
    path = _save(tmp_path / "x.pt", _checkpoint(PLAIN, tensors))
    _refused(lambda: read_published(path), str(path), *parts)


def test_masks_and_wrappers_of_other_versions_are_no_parameters(tmp_path: Path) -> None:
    tensors = _published_tensors(PLAIN)
    mask = np.tril(np.ones((1, 1, 6, 6), np.float32))
    wrapped = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    wrapped |= {f"module._orig_mod.transformer.h.{layer}.attn.bias": mask for layer in (0, 1)}
    read = read_published(_save(tmp_path / "x.pt", _checkpoint(PLAIN, wrapped)))
    plain = read_published(_save(tmp_path / "y.pt", _checkpoint(PLAIN, tensors)))
    jax.tree.map(np.testing.assert_array_equal, read.params, plain.params)


def test_a_file_of_another_kind_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    _refused(lambda: read_published(path), str(path), "before 1.6")
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    _refused(lambda: read_published(path), str(path), "safetensors")


@pytest.mark.parametrize("key", ["iter_num", "best_val_loss", "config"])
def test_what_is_no_number_or_table_is_refused_or_left_out(key: str, tmp_path: Path) -> None:
    for value in (np.zeros(3, np.float32), "many", [1], -1, float("nan"), {"lr": np.zeros(2)}):
        path = _save(tmp_path / "x.pt", _checkpoint(PLAIN, _published_tensors(PLAIN)) | {key: value})
        if key == "iter_num":
            _refused(lambda path=path: read_published(path), str(path), key)
        else:
            training = read_published(path).training
            assert (training.best_val_loss, training.settings) in ((None, {}), (1.5, {}))


def _optimizer(config: ModelConfig, step: Any) -> dict[str, Any]:
    """The state of a torch AdamW after some updates."""
    tensors = _published_tensors(config, seed=1)
    order = optimizer_order(config)
    names = order.decayed + order.others
    first = len(order.decayed)
    return {
        "state": {
            number: {"step": step, "exp_avg": tensors[name], "exp_avg_sq": tensors[name] + 1}
            for number, name in enumerate(names)
        },
        "param_groups": [
            {"lr": 1e-3, "params": list(range(first))},
            {"lr": 1e-3, "params": list(range(first, len(names)))},
        ],
    }


@pytest.mark.parametrize("step", [3, 3.0, np.array(3, np.float32), np.array([3], np.int64)])
def test_moments_are_those_of_their_parameters(step: Any, tmp_path: Path) -> None:
    tensors = _published_tensors(BIASED)
    saved = _checkpoint(BIASED, tensors, optimizer=_optimizer(BIASED, step))
    path = _save(tmp_path / "x.pt", saved | {"config": {"beta1": 0.9, "x": [1]}})
    assert read_published(path).training.moments is None
    read = read_published_training(path)
    assert read.training.settings == {"beta1": 0.9}
    moments = read.training.moments
    assert moments.updates == 3
    expected = read_published(
        _save(tmp_path / "y.pt", _checkpoint(BIASED, _published_tensors(BIASED, seed=1)))
    )
    jax.tree.map(np.testing.assert_array_equal, moments.first, expected.params)
    jax.tree.map(
        lambda found, one: np.testing.assert_array_equal(found, one + 1), moments.second, moments.first
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda o: o.pop("state"), ["state"]),
        (lambda o: o.update(state=[1]), ["state"]),
        (lambda o: o["state"].pop(0), ["h.0.attn.c_attn.weight", "AdamW"]),
        (lambda o: o["state"][1].pop("exp_avg_sq"), ["h.0.attn.c_proj.weight", "exp_avg_sq"]),
        (lambda o: o["state"][1].update(max_exp_avg_sq=1), ["h.0.attn.c_proj.weight", "max_exp_avg_sq"]),
        (lambda o: o["state"].update({99: o["state"][0]}), ["16 parameters", "15"]),
        (lambda o: o["state"][2].update(step=4), ["c_fc.weight", "4 times"]),
        (lambda o: o["state"][2].update(step=float("nan")), ["c_fc.weight", "count"]),
        (lambda o: o["state"][2].update(step=2.0**31), ["c_fc.weight", "count"]),
        (lambda o: o["state"][2].update(step=np.zeros(2, np.float32)), ["c_fc.weight", "count"]),
        (lambda o: o["state"][0].update(exp_avg=np.zeros((8, 24), "f4")), ["exp_avg", "c_attn", "(24, 8)"]),
        (lambda o: o["state"][0].update(exp_avg=np.zeros((24, 8), "i1")), ["exp_avg", "c_attn", "int8"]),
        (lambda o: o["state"][0].update(exp_avg_sq=np.full((24, 8), np.inf, "f4")), ["exp_avg_sq", "finite"]),
        (lambda o: o["state"][0].update(exp_avg=None), ["exp_avg", "missing"]),
        (lambda o: o.pop("param_groups"), ["no parameters"]),
        (lambda o: o.update(param_groups=[{"params": 3}, None]), ["0 and 0 parameters"]),
        (lambda o: o["param_groups"][1]["params"].pop(), ["8 and 6", "8 decay and 7 do not"]),
        (lambda o: o["param_groups"][1]["params"].__setitem__(0, 0), ["number"]),
    ],
)
def test_an_optimiser_that_is_not_of_the_model_is_refused_and_its_weights_are_read(
    change: Callable[[Any], Any], parts: list[str], tmp_path: Path
) -> None:
    optimizer = _optimizer(PLAIN, 3)
    optimizer["state"] = {number: dict(entry) for number, entry in optimizer["state"].items()}
    change(optimizer)
    path = _save(tmp_path / "x.pt", _checkpoint(PLAIN, _published_tensors(PLAIN), optimizer=optimizer))
    assert read_published(path).config == PLAIN
    _refused(lambda: read_published_training(path), str(path), *parts)


def test_moments_stay_unread_where_weights_alone_are_asked_for(tmp_path: Path) -> None:
    saved = _checkpoint(PLAIN, _published_tensors(PLAIN), optimizer=_optimizer(PLAIN, 3), best_val_loss=1.5)
    path = _save(tmp_path / "x.pt", saved)
    with zipfile.ZipFile(path) as archive:
        last = max(
            archive.infolist(),
            key=lambda info: info.header_offset * info.filename.startswith("archive/data/"),
        )
    content = bytearray(path.read_bytes())
    content[last.header_offset + 30 + len(last.filename)] ^= 1
    path.write_bytes(content)
    assert read_published(path).training.step == 7
    _refused(lambda: read_published_training(path), str(path), last.filename, "damaged")


def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "x.pt", np.zeros(4, np.float32))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46
    content[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(content)
    _refused(lambda: read_torch_file(path), str(path), "archive/data/0", "refused")


def test_containers_that_stand_for_many_times_their_size_are_refused(tmp_path: Path) -> None:
    part = _tensor("Float", key="0", count=4, shape=[4], strides=[1])
    many = _save(tmp_path / "x.pt", {"base": np.zeros(4, np.float32), "all": b"(" + part * 100 + b"t"})
    _refused(lambda: read_torch_file(many), str(many), "refused")
    # A list of the list before it, twice, forty times over.
    nested = b"]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(40))
    assert len(read_torch_file(_save(tmp_path / "y.pt", nested))) == 2
