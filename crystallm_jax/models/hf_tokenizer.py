"""The tokenizer as Hugging Face libraries take it, and the vocabularies that their model folders hold.

`tokenizer.json` says in the terms of the `tokenizers` library what `CIFTokenizer` does: it marks the space groups
that stand between their tag and a line end, makes a run of blanks one blank, splits by the same alternatives in the
same order, and looks whole pieces up. No code travels with it.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, SPACEGROUP_TAG, SPACEGROUPS, TOKENS, UNK_TOKEN
from crystallm_jax.errors import ModelError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
# Of GPT-2 and word-level tokenizers, and of CrystaLLM-π: a table of tokens to ids.
VOCABULARY_FILES = ("vocab.json", "vocabulary.json")

# Python's \w, which is of letters and numbers; the library's own also takes marks.
_WORD = r"[\p{L}\p{N}_]+"
# Tokens that mark where a text begins and ends, and nothing in it.
_MARKER = re.compile(r"<[^<>\n]*>|\[[A-Z]+\]")
_BRACKETS = {"[", "]"}
_SHOWN = 8


def tokenizer_files(block_size: int) -> dict[str, dict[str, Any]]:
    """The files of the tokenizer by name, to be written as JSON.

    Args:
        block_size: longest text in tokens that the model takes.
    """
    special = {"unk_token": UNK_TOKEN, "pad_token": UNK_TOKEN}
    return {
        TOKENIZER_FILE: _tokenizer(),
        TOKENIZER_CONFIG_FILE: {
            **special,
            "clean_up_tokenization_spaces": False,
            # GPT-2 would add an embedding for `token_type_ids`, which version 4 of transformers gives by itself.
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": block_size,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        SPECIAL_TOKENS_FILE: special,
    }


def _tokenizer() -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    spacegroups = "|".join(map(re.escape, SPACEGROUPS))
    known = sorted((token for token in TOKENS if token != UNK_TOKEN), key=len, reverse=True)
    unknown = {
        "id": TOKENS.index(UNK_TOKEN),
        "content": UNK_TOKEN,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [unknown],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                # \K: what stands before it is asked for and kept. The empty place behind it becomes the suffix.
                _replace(rf"{re.escape(SPACEGROUP_TAG)} +(?:{spacegroups})\K(?=\n)", SPACEGROUP_SUFFIX),
                _replace(r"[ \t]+", " "),
            ],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "|".join([*map(re.escape, known), _WORD, "[.,;!?]"])},
            # What the pattern does not match is removed.
            "behavior": "Removed",
            "invert": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACEGROUP_SUFFIX}, "content": ""},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate(TOKENS)},
            "unk_token": UNK_TOKEN,
        },
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id, of whichever tokenizer lies in a folder; None where there is none.

    Raises:
        ModelError: a file of it is damaged, or two of its tokens have one id.
    """
    extra: dict[Any, Any]
    if (folder / TOKENIZER_FILE).is_file():
        place = folder / TOKENIZER_FILE
        saved = read_json(place)
        model, added = saved.get("model"), saved.get("added_tokens")
        table = model.get("vocab") if isinstance(model, Mapping) else None
        listed = added if isinstance(added, list) else []
        extra = {str(entry.get("content")): entry.get("id") for entry in listed if isinstance(entry, Mapping)}
    else:
        files = [folder / name for name in VOCABULARY_FILES if (folder / name).is_file()]
        if not files:
            return None
        place, extra = files[0], {}
        table = read_json(place)
        if (folder / ADDED_TOKENS_FILE).is_file():
            extra = read_json(folder / ADDED_TOKENS_FILE)
    if not isinstance(table, Mapping):
        raise ModelError(f"{place}: it has no table of tokens and their ids")
    # What is added does not move what is there.
    vocabulary = {**extra, **table}
    for token, i in vocabulary.items():
        if not isinstance(token, str) or type(i) is not int or i < 0:
            raise ModelError(f"{place}: token {token!r} has the id {i!r}, which is no row of a table")
    if len(set(vocabulary.values())) < len(vocabulary):
        owners: dict[int, str] = {}
        first, second = next(
            (owners[i], token) for token, i in vocabulary.items() if owners.setdefault(i, token) != token
        )
        raise ModelError(f"{place}: tokens {first!r} and {second!r} have one id, {vocabulary[first]}")
    return vocabulary


def rows_of_tokens(vocabulary: Mapping[str, int], rows: int, *, place: str) -> np.ndarray:
    """Which row of a table of embeddings belongs to each of this package's tokens, in their order.

    Tokens that it has besides are dropped, and named in the log, if they only mark where texts begin and end.

    Args:
        vocabulary: token to row.
        rows: of the table.
        place: where they come from, for the message.

    Raises:
        ModelError: a token of this package's is missing, or texts are written with tokens that it lacks.
    """
    missing = [token for token in TOKENS if token not in vocabulary]
    if missing:
        raise ModelError(
            f"{place}: its vocabulary lacks {_listed(missing)} of this package's {len(TOKENS)} tokens: a model of"
            " another dialect"
        )
    beyond = [token for token in TOKENS if vocabulary[token] >= rows]
    if beyond:
        raise ModelError(
            f"{place}: its tokens {_listed(beyond)} are beyond the {rows} rows of its embeddings"
        )
    own = set(TOKENS)
    # A tokenizer may have more tokens than the model has rows: those it can neither read nor write.
    extra = [token for token, i in vocabulary.items() if token not in own and i < rows]
    written = [token for token in extra if not _MARKER.fullmatch(token)]
    if written:
        reason = (
            "it writes each value in brackets, as CrystaLLM-π does, where this package has none"
            if set(written) >= _BRACKETS
            else "it was trained to write them"
        )
        raise ModelError(
            f"{place}: this package's vocabulary lacks its tokens {_listed(written)}, and {reason}: without them the"
            " model would write nonsense; sample from it with the program that made it"
        )
    if extra:
        logger.warning(
            "%s: dropped the tokens %s: here texts begin with `data_` and end with an empty line, and a model that"
            " learned otherwise samples worse",
            place,
            _listed(extra),
        )
    unused = rows - len(TOKENS) - len(extra)
    if unused:
        logger.info("%s: dropped %d rows of embeddings without a token", place, unused)
    return np.array([vocabulary[token] for token in TOKENS])


def read_json(path: Path) -> dict[str, Any]:
    """The table in a file of JSON.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        saved = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ModelError(f"{path}: not a file of JSON, or a damaged one: {reason}") from None
    if not isinstance(saved, dict):
        raise ModelError(f"{path}: holds a {type(saved).__name__}, where a table is expected")
    return saved


def _listed(tokens: list[str]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return f"{shown} and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else shown
