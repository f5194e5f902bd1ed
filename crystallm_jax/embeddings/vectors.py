"""Vectors of tokens: rows of a model's embedding table by kind, and the published CSV files of them."""

import difflib
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from crystallm_jax.cif import ELEMENTS, SPACEGROUPS, CIFError, find_spacegroup
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, TOKENS, UNK_TOKEN
from crystallm_jax.errors import DataError, ModelError

DrawnKind = Literal["atom", "digit", "spacegroup"]
Kind = Literal[DrawnKind, "keyword", "symbol", "all"]
DRAWN_KINDS: tuple[DrawnKind, ...] = get_args(DrawnKind)
"""The kinds that are published as files and drawn."""
# As the published files are called.
_FILE_PARTS: Mapping[DrawnKind, str] = {
    "atom": "atom_vectors",
    "digit": "number_vectors",
    "spacegroup": "spacegroup_vectors",
}
_HEADER = "element"
_ENDINGS = (".csv", ".csv.gz")
# Three times what the widest models would need.
_LONGEST = 1 << 26
_FEWEST = 3


class HasParams(Protocol):
    """A model, or its weights: parameters as nested mappings, the token table at `wte`, `embedding`."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters."""


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """The vectors of some tokens.

    Attributes:
        kind: what the tokens are.
        tokens: those of space groups with their suffix `_sg`.
        vectors: float64 [N, D], a row a token.
    """

    kind: Kind
    tokens: tuple[str, ...]
    vectors: np.ndarray = field(repr=False)


def tokens_of(kind: Kind) -> tuple[str, ...]:
    """The tokens of a kind in the order of the published files: elements by atomic number, others by id."""
    if kind == "atom":
        return tuple(sorted(ELEMENTS, key=lambda symbol: ELEMENTS[symbol].number))
    if kind == "all":
        return TOKENS
    return tuple(token for token in TOKENS if kind_of(token) == kind)


def kind_of(token: str) -> Kind:
    """The kind of a token; `<unk>` is of none and is found among all."""
    if token in ELEMENTS:
        return "atom"
    if token.isdecimal():
        return "digit"
    if token.endswith(SPACEGROUP_SUFFIX):
        return "spacegroup"
    if token == UNK_TOKEN:
        return "all"
    return "keyword" if token.endswith("_") or token.startswith("_") else "symbol"


def find_token(text: str) -> str:
    r"""The token that a text names: itself, a space group without `_sg` or by its number, `\n` for the line end.

    Raises:
        DataError: there is none.
    """
    if text in TOKENS:
        return text
    if text == "\\n":
        return "\n"
    try:
        return find_spacegroup(text) + SPACEGROUP_SUFFIX
    except CIFError:
        near = difflib.get_close_matches(text, [shown(token) for token in TOKENS], n=3)
        near = [token for token in TOKENS if token.lower() == text.lower()] or near
        hint = f"did you mean {', '.join(near)}?" if near else "write one such as Na, 7, Fm-3m, data_ or \\n"
        raise DataError(f"{text!r} is not one of the {len(TOKENS)} tokens: {hint}") from None


def shown(token: str) -> str:
    r"""A token as it is written in a line: the line end as `\n`, the blank in quotes."""
    return {"\n": "\\n", " ": "' '"}.get(token, token)


def vectors_of(model: HasParams, kind: Kind, *, place: str = "the model") -> EmbeddingTable:
    """Rows of a model's embedding table.

    Args:
        model: a loaded model or its weights.
        kind: of the tokens whose rows are wanted.
        place: named in errors.

    Raises:
        ModelError: the table is not one of the 371 tokens, or holds what is no number.
    """
    table = np.asarray(model.params["wte"]["embedding"], np.float64)
    if len(table) != len(TOKENS):
        raise ModelError(
            f"{place}: its vocabulary has {len(table)} tokens, this package's {len(TOKENS)}: which row belongs to"
            " which token is not known"
        )
    ids = {token: i for i, token in enumerate(TOKENS)}
    tokens = tokens_of(kind)
    rows = table[[ids[token] for token in tokens]]
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        token = shown(tokens[int(np.argmax(bad))])
        raise ModelError(
            f"{place}: the vector of {token} has entries that are not finite: the model is damaged"
        )
    return EmbeddingTable(kind, tokens, rows)


def drawn_kind(table: EmbeddingTable) -> DrawnKind:
    """The kind of a table, if it is one that is drawn.

    Raises:
        DataError: it is another.
    """
    for kind in DRAWN_KINDS:
        if kind == table.kind:
            return kind
    raise DataError(f"tokens of the kind {table.kind} are not drawn: choose one of {', '.join(DRAWN_KINDS)}")


def file_name(name: str, kind: DrawnKind) -> str:
    """What the published files are called: `NAME.atom_vectors.csv`, `NAME.number_vectors.csv`, and so on."""
    return f"{name}.{_FILE_PARTS[kind]}.csv"


def is_vector_file(path: str | Path) -> bool:
    """Whether a name is that of a file of vectors: it ends in .csv or .csv.gz."""
    return str(path).lower().endswith(_ENDINGS)


def name_of_file(path: str | Path) -> str:
    """The model's name in the name of a file of vectors."""
    name = Path(path).name
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
    for part in _FILE_PARTS.values():
        name = name.removesuffix(f".{part}")
    return name


def to_csv(table: EmbeddingTable) -> str:
    """The vectors in the published layout: a row a token, numbers in the fewest digits that tell them apart."""
    lines = [",".join([_HEADER, *map(str, range(table.vectors.shape[1]))])]
    for token, vector in zip(table.tokens, table.vectors.tolist(), strict=True):
        lines.append(",".join([token, *map(repr, vector)]))
    return "\n".join(lines) + "\n"


def read_csv(path: str | Path) -> EmbeddingTable:
    """Read a file of vectors in the published layout; its tokens say the kind.

    Raises:
        DataError: the file cannot be read, or is none of that layout.
    """
    path = Path(path)
    lines = _text(path).splitlines()
    header = lines[0].split(",") if lines else []
    width = len(header) - 1
    if not header or header[0] != _HEADER or header[1:] != [str(i) for i in range(width)]:
        raise DataError(f"{path}:1: expected the header {_HEADER},0,1,… of a file of vectors")
    if width < 2:
        raise DataError(f"{path}:1: {width} columns of numbers; a plane needs 2 or more")
    rows = dict(_rows(path, lines[1:], width))
    if len(rows) < _FEWEST:
        raise DataError(f"{path}: {len(rows)} tokens; a picture needs {_FEWEST} or more")
    first = next(iter(rows))
    kind = kind_of(first)
    if kind not in DRAWN_KINDS:
        raise DataError(f"{path}:2: token {first!r} is no element, digit or space group")
    stray = next((token for token in rows if kind_of(token) != kind), None)
    if stray is not None:
        raise DataError(f"{path}: {stray} is not of the kind of {first}, {kind}: give a file of one kind")
    return EmbeddingTable(kind, tuple(rows), np.array(list(rows.values())))


def _rows(path: Path, lines: list[str], width: int) -> Iterator[tuple[str, list[float]]]:
    seen: set[str] = set()
    for number, line in enumerate(lines, start=2):
        token, *texts = line.split(",")
        place = f"{path}:{number}"
        if token not in TOKENS:
            bare = token in SPACEGROUPS
            hint = f": space groups are written {token}{SPACEGROUP_SUFFIX}" if bare else ""
            raise DataError(f"{place}: token {token[:40]!r} is not one of the {len(TOKENS)}{hint}")
        if token in seen:
            raise DataError(f"{place}: token {token} for the second time")
        if len(texts) != width:
            raise DataError(f"{place}: {len(texts)} numbers, the header has {width}")
        seen.add(token)
        yield token, [_number(text, place) for text in texts]


def _number(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{place}: {text[:40]!r} is not a number") from None
    if not math.isfinite(value):
        raise DataError(f"{place}: {text[:40]} is not finite")
    return value


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            data = file.read(_LONGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if len(data) > _LONGEST:
        raise DataError(f"{path}: more than {_LONGEST >> 20} MiB: no file of vectors is so long")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not text in UTF-8, so no file of vectors") from None
