"""`crystallm convert` and `crystallm info` of models: every format to every other, and one line where it cannot be."""

import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.cli import main
from crystallm_jax.config import to_yaml
from crystallm_jax.errors import ModelError
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.models.card import CARD_FILE, read_card
from crystallm_jax.models.kinds import card_of, read_model
from crystallm_jax.models.model import Model, Moments, Training
from crystallm_jax.models.model_folder import (
    CONFIG_FILE,
    MOMENTS_FILE,
    TRAINING_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    read_folder_training,
    write_folder,
)
from crystallm_jax.models.parameters import flattened
from crystallm_jax.models.provenance import training_command
from crystallm_jax.models.published import read_published_training
from crystallm_jax.models.tensors import read_tensors, write_tensors
from crystallm_jax.train_run.metrics import METRICS_FILE
from crystallm_jax.train_run.train_config import TrainConfig

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=371, bias=True)


@pytest.fixture(scope="module")
def weights() -> Model:
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0)))
    first, second = (jax.tree.map(lambda leaf, k=k: leaf**2 + k, params) for k in (1, 2))
    training = Training(7, 0.5, {"learning_rate": 1e-3}, Moments(7, first, second))
    return Model(TINY, params, training)


@pytest.fixture(scope="module")
def model(weights: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mine"
    write_folder(path, weights)
    return path


def _same(ours: Any, theirs: Any) -> None:
    found, expected = flattened(ours), flattened(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])


def _error(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    assert main([str(argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_a_model_goes_round_through_every_format(
    model: Path, weights: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        [model, tmp_path / "ckpt.pt"],
        [tmp_path / "ckpt.pt", tmp_path / "model.npz"],
        [tmp_path / "model.npz", tmp_path / "hub", "--to", "huggingface"],
        [tmp_path / "hub", tmp_path / "sharded", "--storage", "orbax"],
        [tmp_path / "sharded", tmp_path / "back"],
    ]
    for step in steps:
        assert main(["convert", *map(str, step)]) == 0
        assert str(step[1]) in capsys.readouterr().out
        read = read_model(step[1])
        assert read.config == TINY
        _same(read.params, weights.params)
        assert main(["info", str(step[1]), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["parameters"], found["problems"]) == (
            sum(map(np.size, flattened(weights.params).values())),
            [],
        )


def test_moments_go_along_where_the_format_holds_them(model: Path, weights: Model, tmp_path: Path) -> None:
    assert main(["convert", str(model), str(tmp_path / "ckpt.pt")]) == 0
    assert main(["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "again")]) == 0
    assert main(["convert", str(tmp_path / "again"), str(tmp_path / "bare"), "--weights-only"]) == 0
    assert not (tmp_path / "bare" / MOMENTS_FILE).exists()
    for read in (read_published_training(tmp_path / "ckpt.pt"), read_folder_training(tmp_path / "again")):
        assert (read.training.step, read.training.best_val_loss) == (7, 0.5)
        assert read.training.settings["learning_rate"] == 1e-3
        _same(read.training.moments.first, weights.training.moments.first)
        _same(read.training.moments.second, weights.training.moments.second)


def test_a_card_is_told_and_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.md").write_text("# Mine\n\nA model of nothing.\n")
    told = ["--license", "cc0-1.0", "--data", "none: a test", "--metric", "val_loss=0.5", "--notes"]
    assert main(["convert", str(model), str(tmp_path / "one"), *told, str(tmp_path / "notes.md")]) == 0
    assert (
        main(["convert", str(tmp_path / "one"), str(tmp_path / "two"), "--metric", "valid_share=0.25"]) == 0
    )
    card = read_card(tmp_path / "two")
    assert (card.license, card.data) == ("cc0-1.0", "none: a test")
    assert card.metrics == {"val_loss": 0.5, "valid_share": 0.25}
    assert "A model of nothing." in card.text
    capsys.readouterr()
    assert main(["info", str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert "cc0-1.0" in shown
    assert "verified" in shown
    weights_file = tmp_path / "two" / WEIGHTS_FILE
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    assert main(["info", str(tmp_path / "two")]) == 1
    assert f"{WEIGHTS_FILE} is not the file that the card was written for" in capsys.readouterr().out


def test_the_card_of_a_run_says_how_it_was_made(tmp_path: Path) -> None:
    config = TrainConfig(dataset="/somewhere/else/crystals", out_dir=str(tmp_path), n_layer=2, bias=True)
    assert training_command(config) == "crystallm train dataset=crystals n_layer=2 bias=true"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / CONFIG_FILE).write_text(to_yaml(config))
    lines = [{"step": 5, "tokens": 50, "val_loss": 0.7}, {"step": 9, "tokens": 90, "val_loss": 0.6}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = card_of(tmp_path)
    assert (card.data, card.metrics) == ("crystals", {"step": 9, "tokens": 90, "val_loss": 0.6})


def test_what_cannot_be_converted_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    assert "no model there" in _error(capsys, "convert", tmp_path / "none", target)
    assert "is there already" in _error(capsys, "convert", model, model)
    assert "--notes" in _error(capsys, "convert", model, target, "--notes", tmp_path / "none.md")
    (tmp_path / "file").write_text("")
    for name in ("model", "model.pt", "model.npz"):
        assert str(tmp_path / "file") in _error(capsys, "convert", model, tmp_path / "file" / name)
    assert "too long" in _error(capsys, "convert", model, tmp_path / ("x" * 300))
    assert not target.exists()
    with pytest.raises(SystemExit) as usage:
        main(["convert", str(model), str(target), "--metric", "good"])
    assert usage.value.code == 2


def test_files_of_a_user_that_are_called_partial_are_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "model.npz.partial").mkdir()
    (tmp_path / "ckpt.pt.partial").write_text("mine")
    names = ["ckpt.pt", "mine", "model.npz"]
    for name in names:
        assert main(["convert", str(model), str(tmp_path / name)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*names, *(f"{name}.partial" for name in names)}


@pytest.mark.parametrize("name", ["CKPT.PT", "model.NPZ"])
def test_endings_are_told_in_capitals_too(name: str, model: Path, tmp_path: Path) -> None:
    assert main(["convert", str(model), str(tmp_path / name)]) == 0
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("1000000000", "too few for the 1000000000 layers"),
        ("-1", "config.yaml: n_layer=-1"),
        ("[" * 5_000, "config.yaml: cannot be read as YAML: it is nested too deep"),
    ],
)
def test_a_shape_that_cannot_be_is_told_at_once(
    layers: str, message: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "mine")
    config = tmp_path / "mine" / CONFIG_FILE
    config.write_text(config.read_text().replace("n_layer: 1\n", f"n_layer: {layers}\n"))
    with pytest.raises(ModelError, match=re.escape(message)):
        read_model(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: {name: value > 0 for name, value in named.items()}, "is of bool"),
        (lambda named: {name: value.astype(np.int32) for name, value in named.items()}, "is of int32"),
        (lambda named: {name: value * np.float64(1e300) for name, value in named.items()}, "not finite"),
        (lambda named: named | {"h.x": np.zeros((10**9, 0), np.float32)}, "h.x has shape"),
    ],
)
def test_parameters_are_floating_point_numbers_of_as_many_layers(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    message: str,
    model: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(model, tmp_path / "mine")
    (tmp_path / "mine" / CARD_FILE).unlink()
    file = tmp_path / "mine" / WEIGHTS_FILE
    write_tensors(file, change(read_tensors(file)))
    with pytest.raises(ModelError, match=message):
        read_model(tmp_path / "mine")


def test_a_card_with_other_line_ends_keeps_its_hashes(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "mine")
    card = tmp_path / "mine" / CARD_FILE
    card.write_bytes(b"\xef\xbb\xbf" + card.read_bytes().replace(b"\n", b"\r\n"))
    assert read_card(tmp_path / "mine") == read_card(model)


def test_a_card_that_is_damaged_or_hostile_is_one_line_or_harmless(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "mine")
    card = tmp_path / "mine" / CARD_FILE
    card.write_text("---\nparameters: .inf\n---\n")
    with pytest.raises(ModelError, match="the head of the card is damaged"):
        read_model(tmp_path / "mine")
    card.write_text('---\nlicense: "\\e[31mred"\n---\n\x1b[2Jgone')
    assert main(["info", str(tmp_path / "mine")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("x", "--dtype int8", "--dtype int8: of NumPy files"),
        ("x.pt", "--dtype float16", "float32 alone"),
        ("x.npz", "--storage orbax", "--storage orbax: of model folders alone"),
        ("x.npz", "--push me/mine", "--push me/mine: only folders are uploaded"),
        ("x", "--private", "--private says how --push"),
        ("x.pt", "--license cc0-1.0", "--license: there is no model card in"),
        ("x.npz", "--metric val_loss=1", "--metric: there is no model card in"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused_before_anything_is_read(
    target: str, flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [tmp_path / "none", tmp_path / target, *flags.split()]
    assert message in _error(capsys, "convert", *given, code=2)


def test_parameters_stand_for_the_folder_that_they_lie_in(
    model: Path, weights: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model / WEIGHTS_FILE), str(tmp_path / "ckpt.pt")]) == 0
    _same(
        read_published_training(tmp_path / "ckpt.pt").training.moments.first, weights.training.moments.first
    )
    # Any other file of tensors is not what the folder's configuration is of.
    capsys.readouterr()
    assert "tensors alone" in _error(capsys, "convert", model / MOMENTS_FILE, tmp_path / "target")


@pytest.mark.parametrize(
    "change",
    [
        {"updates": "many"},
        {"updates": -1},
        {"step": [1]},
        {"step": 10**20},
        {"step": 1.5},
        {"best_val_loss": "low"},
    ],
)
def test_a_training_state_that_says_nonsense_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    shutil.copytree(model, tmp_path / "mine")
    (tmp_path / "mine" / CARD_FILE).unlink()
    file = tmp_path / "mine" / TRAINING_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert f"{file}: " in _error(capsys, "convert", tmp_path / "mine", tmp_path / "ckpt.pt")


def test_moments_of_no_kind_and_foreign_vocabularies_are_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "mine")
    (tmp_path / "mine" / CARD_FILE).unlink()
    moments = tmp_path / "mine" / MOMENTS_FILE
    write_tensors(moments, read_tensors(moments) | {"third.wte.embedding": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match=r"third\.wte\.embedding is of no moments"):
        read_folder_training(tmp_path / "mine")
    config = tmp_path / "mine" / CONFIG_FILE
    config.write_text(config.read_text().replace("vocab_size: 371", "vocab_size: 372"))
    (tmp_path / "mine" / VOCABULARY_FILE).write_text(json.dumps([*TOKENS, "new"]))
    with pytest.raises(ModelError, match="it has 372 tokens, this package has 371"):
        read_model(tmp_path / "mine")


def test_a_checkpoint_of_a_run_is_described_with_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(Path(__file__).parent / "fixtures" / "models" / "run_2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (checkpoint,) = (tmp_path / "run_2" / "checkpoints").iterdir()
    assert main(["info", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["parameters"], found["problems"]) == ("checkpoint", 4984, [])
    assert found["training_command"].startswith("crystallm train ")


def test_the_command_of_a_run_keeps_the_names_of_models(tmp_path: Path) -> None:
    for given, kept in (("hf:me/mine", "hf:me/mine"), (str(tmp_path / "ckpt.pt"), "ckpt.pt")):
        assert training_command(TrainConfig(init_from=given)) == f"crystallm train init_from={kept}"


class _Evil:
    """What a hostile pickle would have the reader call."""

    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


def _hostile(kind: str, path: Path, model: Path) -> Path:  # noqa: PLR0912  a kind a branch
    import pickle

    match kind:
        case "pickle":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("ckpt/data.pkl", pickle.dumps(_Evil(), protocol=2))
        case "bare pickle":
            path.write_bytes(pickle.dumps(_Evil()))
        case "objects":
            np.savez(path.with_suffix(".npz"), **{"wte.embedding": np.array([_Evil()], object)})
            return path.with_suffix(".npz")
        case "bomb":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("ckpt/data.pkl", b"\0" * (1 << 24))
        case "outside":
            with tarfile.open(path, "w:gz") as archive:
                info = tarfile.TarInfo("../ckpt.pt")
                archive.addfile(info)
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("a model, honestly")
        case "truncated":
            path.write_bytes((model / WEIGHTS_FILE).read_bytes()[:100])
        case "alone":
            path.write_bytes((model / WEIGHTS_FILE).read_bytes())
        case "parameters of a folder that is gone":
            path.mkdir()
            (path / CONFIG_FILE).write_text((model / CONFIG_FILE).read_text())
        case "anchors":
            path.mkdir()
            (path / WEIGHTS_FILE).write_bytes((model / WEIGHTS_FILE).read_bytes())
            (path / CONFIG_FILE).write_text("a: &a [1, 1]\nb: [*a, *a]\n")
        case "a card of another place":
            path.mkdir()
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                (path / name).write_bytes((model / name).read_bytes())
            (path / CARD_FILE).write_text("---\nfiles: {../secret: {bytes: 1, sha256: x}}\n---\n")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "pickle",
        "bare pickle",
        "objects",
        "bomb",
        "outside",
        "empty",
        "text",
        "truncated",
        "alone",
        "parameters of a folder that is gone",
        "anchors",
        "a card of another place",
    ],
)
def test_hostile_and_damaged_models_are_one_line_and_do_nothing(
    kind: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _hostile(kind, tmp_path / "model.pt", model)
    before = {file.name for file in tmp_path.iterdir()}
    message = _error(capsys, "convert", path, tmp_path / "target")
    assert str(path) in message
    assert {file.name for file in tmp_path.iterdir()} == before
