"""Log-probabilities of given texts, and the verb that ranks crystals by them."""

import csv
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import crystallm_jax as cl
from crystallm_jax.cif import make_prompt, preprocess_cif, stream_text
from crystallm_jax.cli import main
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.errors import ModelError


@pytest.fixture(scope="module")
def model() -> cl.CrystalModel:
    return cl.load_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [stream_text(preprocess_cif(record.text)) for record in list(read_corpus())[:1200:150]]


def test_log_probabilities_are_those_of_the_logits(model: cl.CrystalModel, texts: list[str]) -> None:
    found = model.token_log_probs(texts)
    for text, log_probs in zip(texts, found, strict=True):
        tokens = model.tokenizer.encode_cif(text).astype(np.int32)
        padded = np.zeros((1, 704), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = jax.nn.log_softmax(model.logits(padded))[0]
        assert log_probs.dtype == np.float64
        np.testing.assert_allclose(
            log_probs, logits[np.arange(len(tokens) - 1), tokens[1:]], rtol=0, atol=1e-4
        )
    np.testing.assert_allclose(model.log_prob(texts), [row.sum() for row in found], rtol=1e-12)


def test_neither_order_nor_company_changes_a_score(model: cl.CrystalModel, texts: list[str]) -> None:
    together, alone = model.log_prob(texts[::-1])[::-1], [model.log_prob([text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-3)


def test_a_sample_has_the_log_probability_that_its_text_is_given(model: cl.CrystalModel) -> None:
    prompt = make_prompt("Na4Cl4")
    samples = model.generate(prompt, num_samples=2, max_new_tokens=120, seed=4)
    found = model.log_prob([sample.text for sample in samples], [prompt, prompt])
    np.testing.assert_allclose(found, [sample.log_prob for sample in samples], rtol=0, atol=1e-3)


def test_texts_that_cannot_be_scored_are_refused(model: cl.CrystalModel, texts: list[str]) -> None:
    with pytest.raises(ModelError, match="none of the dialect"):
        model.log_prob(["# a CIF\ndata_Na\n"])
    with pytest.raises(ModelError, match="none of the dialect"):
        model.log_prob([texts[0] + "µ"])
    with pytest.raises(ModelError, match=r"text 1 has \d+ tokens: from 1 to 1025"):
        model.log_prob([texts[0], texts[0] + texts[0] * 9])
    with pytest.raises(ModelError, match="text 0 does not begin with its prompt"):
        model.log_prob(texts[:1], [make_prompt("U1")])


def _write(folder: Path) -> list[str]:
    """CIFs: a real one, the same seven times as wide, and one that is none."""
    text = next(read_corpus()).text
    wide = re.sub(r"(_cell_length_. +)(\S+)", lambda line: f"{line[1]}{7 * float(line[2]):.4f}", text)
    for name, content in (("real", text), ("wide", wide), ("none", "data_nothing\n")):
        (folder / f"{name}.cif").write_text(content)
    return [str(folder / name) for name in ("wide.cif", "none.cif", "real.cif")]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_crystals_are_ranked_and_what_has_no_score_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = _write(tmp_path), tmp_path / "out" / "scores.csv"
    assert main(["score", *files, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 crystals, 2 scored" in printed
    assert "not scored: parse" in printed
    rows = _rows(out)
    assert [row["id"] for row in rows] == ["real", "wide", "none"]
    assert [row["rank"] for row in rows] == ["1", "2", ""]
    assert rows[2]["problem"].startswith("parse: ")
    for row in rows[:2]:
        perplexity = np.exp(-float(row["log_prob"]) / int(row["tokens"]))
        assert float(row["perplexity"]) == pytest.approx(perplexity, rel=1e-4)


def test_what_the_model_is_told_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tokens = _write(tmp_path)[2], {}
    for given in ("nothing", "composition", "spacegroup"):
        out = tmp_path / f"{given}.csv"
        assert main(["score", file, "--given", given, "--out", str(out), "--json"]) == 0
        tokens[given] = json.loads(capsys.readouterr().out)["scores"][0]["tokens"]
    model = cl.load_model()
    text = stream_text(preprocess_cif(next(read_corpus()).text))
    whole = len(model.tokenizer.encode_cif(text))
    composition = text.split("\n", 1)[0].removeprefix("data_")
    found = re.search(r"space_group_name_H-M +(\S+)", text)
    assert found is not None
    for given, prompt in (
        ("composition", make_prompt(composition)),
        ("spacegroup", make_prompt(composition, found[1])),
    ):
        assert tokens[given] == whole - len(model.tokenizer.encode_cif(prompt))
    assert tokens["nothing"] == whole - 1


def test_nothing_to_score_is_a_failure_that_leaves_its_reasons(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    assert main(["score", _write(tmp_path)[1], "--out", str(out)]) == 1
    assert [row["problem"][:6] for row in _rows(out)] == ["parse:"]
    assert main(["score", str(tmp_path / "missing.cif"), "--out", str(out)]) == 1
