"""`crystallm convert` and `crystallm info` of models: every format to every other, and one line where it cannot be."""

import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from crystallm_jax.cli import main
from crystallm_jax.config import to_yaml
from crystallm_jax.convert.arrange import flattened
from crystallm_jax.convert.card import CARD_FILE, read_card
from crystallm_jax.convert.folder import (
    CONFIG_FILE,
    MOMENTS_FILE,
    WEIGHTS_FILE,
    read_folder_training,
    write_folder,
)
from crystallm_jax.convert.published import read_published_training
from crystallm_jax.convert.weights import Moments, Training, Weights
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.load import load_weights
from crystallm_jax.training.metrics import METRICS_FILE
from crystallm_jax.exchange.provenance import card_of, training_command

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=371, bias=True)


@pytest.fixture(scope="module")
def weights() -> Weights:
    params = jax.device_get(jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0)))
    first, second = (jax.tree.map(lambda leaf, k=k: leaf**2 + k, params) for k in (1, 2))
    training = Training(7, 0.5, {"learning_rate": 1e-3}, Moments(7, first, second))
    return Weights(TINY, params, training)


@pytest.fixture(scope="module")
def model(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mine"
    write_folder(path, weights)
    return path


def _same(ours: Any, theirs: Any) -> None:
    found, expected = flattened(ours), flattened(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_a_model_goes_round_through_every_format(
    model: Path, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        read = load_weights(step[1])
        assert read.config == TINY
        _same(read.params, weights.params)
        assert main(["info", str(step[1]), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["parameters"], found["problems"]) == (
            sum(map(np.size, flattened(weights.params).values())),
            [],
        )


def test_moments_go_along_where_the_format_holds_them(model: Path, weights: Weights, tmp_path: Path) -> None:
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
    assert "int8" in _error(capsys, "convert", model, target, "--dtype", "int8")
    assert "float32 alone" in _error(capsys, "convert", model, tmp_path / "x.pt", "--dtype", "float16")
    assert "--push" in _error(capsys, "convert", model, tmp_path / "x.npz", "--push", "me/mine")
    assert "--notes" in _error(capsys, "convert", model, target, "--notes", tmp_path / "none.md")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in _error(capsys, "convert", model, tmp_path / "file" / "model")
    assert not target.exists()
    with pytest.raises(SystemExit) as usage:
        main(["convert", str(model), str(target), "--metric", "good"])
    assert usage.value.code == 2


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
