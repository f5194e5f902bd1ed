"""Properties that hold for any text, tokens and records: nothing is lost on the way there and back."""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystallm_jax.cif import (
    CIFError,
    CIFTokenizer,
    postprocess_cif,
    preprocess_cif,
    prompt_from_cif,
    stream_text,
)
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, SPACEGROUP_TAG, TOKENS, UNK_TOKEN
from crystallm_jax.data import TokenStore
from crystallm_jax.data.describe import describe
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.data.store import find_starts
from crystallm_jax.errors import DataError

TOKENIZER = CIFTokenizer()
STREAM = (Path(__file__).parent / "fixtures" / "cif" / "manganite.stream.txt").read_text()
DATA, BLANK, END = (TOKENIZER.token_to_id[token] for token in ("data_", " ", "\n"))
ANY_ID = st.integers(0, TOKENIZER.vocab_size - 1)
WORDS = [
    i for token, i in TOKENIZER.token_to_id.items()
    if token.strip() and token != UNK_TOKEN and not token.endswith(SPACEGROUP_SUFFIX)
]  # fmt: skip
GROUPS = [i for token, i in TOKENIZER.token_to_id.items() if token.endswith(SPACEGROUP_SUFFIX)]
TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*TOKENS, f"{SPACEGROUP_TAG} P1\n", "  ", "\t", "\r\n", "q", "é", ";"]), max_size=40
    ).map("".join),
    st.tuples(st.integers(0, len(STREAM)), st.integers(0, 30), st.text(max_size=3)).map(
        lambda cut: STREAM[: cut[0]] + cut[2] + STREAM[cut[0] + cut[1] :]
    ),
)
# What one line can hold; surrogates are no text, and a file's lines end at line ends alone.
RECORD_ID = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=12)
RECORD = st.builds(
    lambda ids: np.array([DATA, *ids, END, END], np.uint16),
    st.lists(ANY_ID.filter(lambda i: i != DATA), max_size=30),
)
RECORDS = st.lists(
    st.tuples(RECORD_ID, RECORD, st.sampled_from(["train", "val"]), st.booleans()), min_size=1, max_size=8
)


@contextmanager
def _store(records: list[tuple[str, np.ndarray, str, bool]]) -> Iterator[Path]:
    """A folder for one example: fixtures are shared between the examples of a property."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        with StoreWriter(folder) as out:
            for record_id, tokens, split, marked in records:
                out.add(record_id, tokens, split=split, underrepresented=marked)
            out.commit(sources=(), options={}, counts={}, versions={})
        yield folder


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_the_fast_path_is_the_plain_one(text: str) -> None:
    assert TOKENIZER.encode_cif(text).tolist() == TOKENIZER.encode(TOKENIZER.tokenize_cif(text))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, BLANK, END]), max_size=60))
def test_tokens_apart_have_a_text_that_has_their_text(ids: list[int]) -> None:
    """Side by side they may be read as others: `C` and `loop_` as `Cl` and an unknown word."""
    text = TOKENIZER.decode([part for i in ids for part in (i, BLANK)])
    assert TOKENIZER.decode(TOKENIZER.encode_cif(text)) == re.sub(" +", " ", text)


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_ID, max_size=60))
def test_decoding_joins_the_texts_of_tokens(ids: list[int]) -> None:
    text = TOKENIZER.decode(ids)
    assert text == "".join(TOKENIZER.id_to_token[i] for i in ids)
    assert TOKENIZER.decode(np.array(ids, np.uint16)) == text
    tokens = [TOKENS[i] for i in ids]
    assert TOKENIZER.encode(tokens) == ids


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.tuples(st.sampled_from(GROUPS))), max_size=40))
def test_words_between_blanks_round_trip(parts: list[int | tuple[int]]) -> None:
    """Any tokens do, with blanks between words and a space group where the dialect has it."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, tuple):
            ids += [TOKENIZER.token_to_id[SPACEGROUP_TAG], BLANK, *part, END]
        else:
            ids += [part, BLANK]
    assert TOKENIZER.encode_cif(TOKENIZER.decode(ids)).tolist() == ids


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXT.filter(lambda text: text.isascii()), max_size=6))
def test_records_can_be_encoded_one_by_one(texts: list[str]) -> None:
    """No token spans two line ends, so pieces that end so have the tokens of the whole."""
    pieces = [f"{text}\n\n" for text in texts]
    apart = [TOKENIZER.encode_cif(piece) for piece in pieces]
    whole = TOKENIZER.encode_cif("".join(pieces)).tolist()
    assert whole == [i for piece in apart for i in piece.tolist()]


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_the_dialect_answers_or_refuses_any_text(text: str) -> None:
    for function in (preprocess_cif, postprocess_cif, prompt_from_cif):
        answer = _answer(function, text)
        assert isinstance(answer, str) or len(str(answer).splitlines()) == 1
    stream = stream_text(text)
    assert stream.endswith("\n")
    assert stream_text(stream) == stream


def _answer(function: Callable[[str], str], text: str) -> str | CIFError:
    try:
        return function(text)
    except CIFError as error:
        return error


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_what_is_stored_is_read_again(records: list[tuple[str, np.ndarray, str, bool]]) -> None:
    with _store(records) as folder:
        for split in ("train", "val"):
            mine = [record for record in records if record[2] == split]
            if not mine:
                with pytest.raises(DataError, match=f"no split '{split}'"):
                    TokenStore.open(folder, split)
                continue
            store = TokenStore.open(folder, split)
            store.verify()
            assert store.ids == tuple(record[0] for record in mine)
            assert [store.record(i).tolist() for i in range(len(store))] == [r[1].tolist() for r in mine]
            assert [store.text(i) for i in range(len(store))] == [TOKENIZER.decode(r[1]) for r in mine]
            assert store.starts.tolist() == find_starts(store.tokens).tolist()
            marked = [start for start, record in zip(store.starts.tolist(), mine, strict=True) if record[3]]
            if marked:
                assert store.underrepresented.tolist() == marked
        assert describe(folder).problems == ()
        assert sum(split.records for split in describe(folder).splits.values()) == len(records)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.data())
def test_any_changed_byte_is_noticed(
    records: list[tuple[str, np.ndarray, str, bool]], data: st.DataObject
) -> None:
    """In the tokens by the checksum; in the other files by what they then say, if that is anything else."""
    with _store(records) as folder:
        before = _everything(folder)
        names = sorted(path.name for path in folder.iterdir() if path.name != "dropped.csv")
        path = folder / data.draw(st.sampled_from(names))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            after = _everything(folder)
        except DataError:
            return
        assert path.suffix != ".bin"
        if path.name.endswith("starts.npy"):
            assert after == before, "an offset may not change unnoticed"


def _everything(folder: Path) -> dict[str, object]:
    """All that a store says, and that it verifies.

    Raises:
        DataError: it does not.
    """
    found = describe(folder)
    if found.problems:
        raise DataError(found.problems[0])
    stores = [TokenStore.open(folder, split) for split in found.splits]
    return {"described": dataclasses.asdict(found), "ids": [store.ids for store in stores]}
