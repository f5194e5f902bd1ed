"""The tokenizer: ids as published, and a fast path that equals the plain one on every text."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.cif import SPACEGROUPS, CIFError, CIFTokenizer, vocabulary_sha256
from crystallm_jax.cif.vocabulary import TOKENS

TOKENIZER = CIFTokenizer()
STREAM = (Path(__file__).parent / "fixtures" / "cif" / "manganite.stream.txt").read_text()
TAG = "_symmetry_space_group_name_H-M"


def equal_paths(text: str) -> None:
    plain = TOKENIZER.encode(TOKENIZER.tokenize_cif(text))
    fast = TOKENIZER.encode_cif(text)
    assert fast.dtype == np.uint16
    assert fast.tolist() == plain


def published_tokens(text: str, single_spaces: bool = True) -> list[str]:
    """The published procedure as its description says it, one step at a time."""
    known = [token for token in TOKENS if token != "<unk>"]
    text = re.sub(rf"({TAG} *\b({'|'.join(SPACEGROUPS)}))\n", r"\1_sg\n", text)
    if single_spaces:
        text = re.sub(r"[ \t]+", " ", text)
    pattern = "|".join(re.escape(token) for token in sorted(known, key=len, reverse=True))
    found = re.findall(rf"({pattern}|\w+|[\.,;!?])", text)
    return [token if token in known else "<unk>" for token in found]


def test_vocabulary_size_and_order():
    assert TOKENIZER.vocab_size == len(TOKENS) == len(set(TOKENS)) == 371
    assert TOKENIZER.token_to_id["Si"] == 0
    assert TOKENIZER.token_to_id["Pm"] != TOKENIZER.token_to_id["Pm_sg"]
    assert TOKENIZER.id_to_token[TOKENIZER.token_to_id["Pm_sg"]] == "Pm"
    assert TOKENIZER.decode([TOKENIZER.unk_id, TOKENIZER.newline_id]) == "<unk>\n"
    assert len(vocabulary_sha256()) == 64


def test_decoding_gives_the_text_back():
    assert TOKENIZER.decode(TOKENIZER.encode_cif(STREAM)) == re.sub(" +", " ", STREAM)
    assert TOKENIZER.decode(TOKENIZER.encode(TOKENIZER.tokenize_cif(STREAM, single_spaces=False))) == STREAM


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("Sixyz0", ["Si", "x", "y", "z", "0"]),
        ("Po qZr Cl", ["P", "<unk>", " ", "<unk>", " ", "Cl"]),
        ("<unk>;!?", ["<unk>"] * 4),
        ("a\t \tb", ["<unk>", " ", "<unk>"]),
        ("x\r\ny", ["x", "\n", "y"]),
        ("P1\n", ["P", "1", "\n"]),
        (f"{TAG}   P1\n", [TAG, " ", "P1_sg", "\n"]),
        (f"{TAG} P1 \n", [TAG, " ", "P", "1", " ", "\n"]),
        (f"{TAG} P1", [TAG, " ", "P", "1"]),
        (f"{TAG}P1\n", [TAG, "P", "1", "\n"]),
        (f"{TAG}\tPm\n", [TAG, " ", "Pm", "\n"]),
        (f"q{TAG} Pm\n", ["<unk>", "-", "<unk>", " ", "Pm_sg", "\n"]),
        (f"{TAG} P6\n", [TAG, " ", "P", "6", "\n"]),
        ("xPm_sgNa", ["x", "Pm_sg", "Na"]),
        ("É_cell_volume", ["<unk>"]),
    ],
)
def test_examples(text, tokens):
    assert TOKENIZER.tokenize_cif(text) == tokens == published_tokens(text)
    equal_paths(text)


def test_tabs_without_single_spaces():
    assert TOKENIZER.tokenize_cif("x \t y", single_spaces=False) == ["x", " ", " ", "y"]


FRAGMENTS = st.one_of(
    st.sampled_from([*TOKENS, TAG + " P1\n", TAG + "  Fm-3m\n", "\t", "\r\n", "  ", "_sg", "Q"]),
    st.sampled_from(["é", "\ue001", "\ud800", "٣"]),
    st.text(max_size=4),
    st.text(alphabet="Pmn_sgabNaCl01 .\n\t\x1c\x00", max_size=6),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=30).map("".join))
def test_fast_path_equals_the_plain_one(text):
    assert TOKENIZER.tokenize_cif(text) == published_tokens(text)
    equal_paths(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(STREAM)), st.integers(0, 40), FRAGMENTS)
def test_fast_path_on_changed_texts(start, length, inserted):
    equal_paths(STREAM[:start] + inserted + STREAM[start + length :])


def test_the_word_cache_is_bounded():
    tokenizer = CIFTokenizer()
    text = " ".join(f"Na{i}q" for i in range(70_000)) + " " + "q" * 1000
    assert len(tokenizer.encode_cif(text)) > 0
    assert len(tokenizer._words) <= 1 << 16
    assert tokenizer.encode_cif("Na1q").tolist() == tokenizer.encode(["Na", "1", "<unk>"])


def test_what_is_outside_the_vocabulary_is_refused():
    with pytest.raises(CIFError, match="token 'Po' is not one of the 371"):
        TOKENIZER.encode(["Na", "Po"])
    for wrong in (371, -1):
        with pytest.raises(CIFError, match=f"token id {wrong} is outside 0 to 370"):
            TOKENIZER.decode([0, wrong])


def test_importing_the_dialect_imports_neither_pymatgen_nor_jax():
    code = (
        "import sys, crystallm_jax.cif as c; c.CIFTokenizer().encode_cif('data_');"
        "c.make_prompt('Na4Cl4', 'Fm-3m');"
        "assert not {'pymatgen', 'jax', 'spglib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_golden_vocabulary_and_ids(golden):
    vocabulary = json.loads((golden / "vocab.json").read_text())
    assert list(TOKENS) == vocabulary["tokens"]
    assert dict(TOKENIZER.token_to_id) == vocabulary["token_to_id"]
    assert {str(i): text for i, text in TOKENIZER.id_to_token.items()} == vocabulary["id_to_decoded"]
    with gzip.open(golden / "prep.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            assert TOKENIZER.encode_cif(record["stream_text"]).tolist() == record["token_ids"], record["id"]
            assert TOKENIZER.encode(TOKENIZER.tokenize_cif(record["stream_text"])) == record["token_ids"]
    with gzip.open(golden / "validity.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            equal_paths(record["raw_text"])
