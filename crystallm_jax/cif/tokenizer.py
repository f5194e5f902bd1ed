"""CIF text to token ids and back, equal to the published tokenizer on every text."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

import numpy as np

from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, SPACEGROUP_TAG, SPACEGROUPS, TOKENS, UNK_TOKEN
from crystallm_jax.errors import CIFError

# The fast path writes token i as the character 256 + i, outside ASCII and below the surrogates.
_OFFSET = 256
_SKIPPED = np.uint16(0xFFFF)
_CACHED_WORD_LENGTH = 64
_CACHED_WORDS = 1 << 16


class _WordCache(dict[str, str]):
    """Words already tokenised, as one character a token; it forgets everything once it is full."""

    def __init__(self, pattern: re.Pattern[str], codes: Mapping[str, str]) -> None:
        super().__init__()
        self._pattern = pattern
        self._codes = codes

    def __missing__(self, word: str) -> str:
        unknown = self._codes[UNK_TOKEN]
        coded = "".join([self._codes.get(token, unknown) for token in self._pattern.findall(word)])
        if len(word) <= _CACHED_WORD_LENGTH:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = coded
        return coded


class CIFTokenizer:
    """The published tokenizer of CIF text: 371 tokens, unknown words as `<unk>`, other characters skipped.

    Attributes:
        vocab_size: 371.
        token_to_id: token (space groups with the suffix `_sg`) to id.
        id_to_token: id to text (space groups without the suffix).
        unk_id: id of `<unk>`.
        newline_id: id of the line end; two of them end a CIF.
    """

    def __init__(self) -> None:
        self.vocab_size: int = len(TOKENS)
        self.token_to_id: Mapping[str, int] = MappingProxyType({token: i for i, token in enumerate(TOKENS)})
        self.id_to_token: Mapping[int, str] = MappingProxyType(
            {i: token.removesuffix(SPACEGROUP_SUFFIX) for i, token in enumerate(TOKENS)}
        )
        self.unk_id: int = self.token_to_id[UNK_TOKEN]
        self.newline_id: int = self.token_to_id["\n"]
        known = sorted((token for token in TOKENS if token != UNK_TOKEN), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known)) + r"|\w+|[.,;!?]")
        self._spacegroup_pattern = re.compile(
            rf"({SPACEGROUP_TAG} *\b(?:{'|'.join(map(re.escape, SPACEGROUPS))}))\n"
        )
        self._words = _WordCache(self._pattern, {token: chr(_OFFSET + i) for i, token in enumerate(TOKENS)})
        self._split_words = re.compile(r"([A-Za-z_]\S*)").split
        self._ids_of_codes = self._code_table()

    def _code_table(self) -> np.ndarray:
        """Id of each character code of a text whose words are coded; blanks and tabs are both the blank."""
        table = np.full(_OFFSET + self.vocab_size, _SKIPPED, dtype=np.uint16)
        for token, i in self.token_to_id.items():
            if len(token) == 1:
                table[ord(token)] = i
            table[_OFFSET + i] = i
        table[[ord(character) for character in ";!?"]] = self.unk_id
        table[ord("\t")] = self.token_to_id[" "]
        return table

    def tokenize_cif(self, text: str, single_spaces: bool = True) -> list[str]:
        """Split a text into tokens.

        Args:
            text: any text; what the vocabulary lacks becomes `<unk>` (words and `.,;!?`) or is skipped.
            single_spaces: take a run of blanks and tabs as one blank.
        """
        text = self._mark_spacegroups(text)
        if single_spaces:
            text = re.sub(r"[ \t]+", " ", text)
        return [token if token in self.token_to_id else UNK_TOKEN for token in self._pattern.findall(text)]

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Ids of tokens.

        Raises:
            CIFError: a token outside the vocabulary.
        """
        try:
            return [self.token_to_id[token] for token in tokens]
        except KeyError as error:
            raise CIFError(
                f"token {error.args[0]!r} is not one of the {self.vocab_size} of the vocabulary: "
                "make tokens with tokenize_cif"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids (integers or an array of them); space groups lose their suffix.

        Raises:
            CIFError: an id outside the vocabulary.
        """
        plain = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return "".join([self.id_to_token[i] for i in plain])
        except KeyError as error:
            raise CIFError(f"token id {error.args[0]!r} is outside 0 to {self.vocab_size - 1}") from None

    def encode_cif(self, text: str) -> np.ndarray:
        """Token ids of a text as a uint16 array: `encode(tokenize_cif(text))`, but fast.

        Tokens never span white space, but for the space group after its tag, which is marked first. So words
        that start with a letter or an underscore are looked up whole, and all else is one table look-up a
        character.
        """
        if not text.isascii():
            return np.array(self.encode(self.tokenize_cif(text)), dtype=np.uint16)
        parts = self._split_words(self._mark_spacegroups(text))
        parts[1::2] = map(self._words.__getitem__, parts[1::2])
        codes = np.frombuffer("".join(parts).encode("utf-16-le"), dtype="<u2")
        ids = self._ids_of_codes[codes]
        keep = ids != _SKIPPED
        blank = ids == self.token_to_id[" "]
        keep[1:] &= ~(blank[1:] & blank[:-1])
        return ids[keep]

    def _mark_spacegroups(self, text: str) -> str:
        """The text with `_sg` after each space-group symbol that stands between its tag and a line end."""
        if SPACEGROUP_TAG not in text:
            return text
        return self._spacegroup_pattern.sub(rf"\1{SPACEGROUP_SUFFIX}\n", text)


@cache
def shared_tokenizer() -> CIFTokenizer:
    """One tokenizer for all that need it: the words that it remembers serve each of them."""
    return CIFTokenizer()
