"""What the automaton knows of the dialect by heart: its states, the tokens that each allows, and where they lead."""

from collections.abc import Iterable
from enum import IntEnum, auto
from functools import cache
from typing import NamedTuple

import numpy as np

from crystallm_jax.cif.elements import ELEMENTS
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, SPACEGROUP_TAG, SPACEGROUPS, TOKENS

VOCABULARY = len(TOKENS)
TOKEN_ID = {token: i for i, token in enumerate(TOKENS)}
WORD_BITS = 32
WORDS = -(-VOCABULARY // WORD_BITS)
"""A set of tokens is so many uint32: bit i % 32 of word i // 32 is token i."""

SPACE, NEWLINE, POINT, MINUS = (TOKEN_ID[symbol] for symbol in " \n.-")
DIGITS = tuple(TOKEN_ID[digit] for digit in "0123456789")
UNRANKED = tuple(element.symbol for element in ELEMENTS.values() if element.electronegativity is None)
"""He, Ne and Ar have no electronegativity: the data line may have them anywhere."""


class Node(IntEnum):
    """Where in the text a row is."""

    SCRIPT = 0
    WAITING = auto()
    DONE = auto()
    GROUP = auto()
    WHOLE = auto()
    FRACTION = auto()
    ELEMENT = auto()
    ELEMENT_GAP = auto()
    LABEL_ELEMENT = auto()
    GAP = auto()
    OCCUPANCY = auto()
    OCCUPANCY_POINT = auto()
    OCCUPANCY_ZERO = auto()
    ROW_END = auto()
    DATA_FIRST = auto()
    DATA_ATOM = auto()
    DATA_DIGITS = auto()
    PROPERTY_FIRST = auto()
    PROPERTY_ROW = auto()
    PROPERTY_GAP = auto()
    STRUCTURAL_FIRST = auto()
    STRUCTURAL_ATOM = auto()
    STRUCTURAL_DIGITS = auto()
    BRACKET_FIRST = auto()
    BRACKET_ATOM = auto()
    BRACKET_DIGITS = auto()
    BRACKET_CLOSED = auto()
    SUM_FIRST = auto()
    SUM_ATOM = auto()
    SUM_DIGITS = auto()
    QUOTED_FIRST = auto()
    QUOTED_ATOM = auto()
    QUOTED_DIGITS = auto()
    QUOTED_CLOSED = auto()
    FIELD_END = auto()
    """Never rested in: the token just read was the first of what the script has next."""


class Kind(IntEnum):
    """What the model writes by itself between two pieces of the script."""

    EDGE = 0
    """The first cell length, which the script may repeat. The six of the cell are in the order of the text."""
    SECOND = auto()
    THIRD = auto()
    ALPHA = auto()
    BETA = auto()
    GAMMA = auto()
    CELL_VOLUME = auto()
    """The volume that lengths and angles give."""
    VOLUME = auto()
    NUMBER = auto()
    UNITS = auto()
    GROUP = auto()
    SITES = auto()
    DATA = auto()
    PROPERTIES = auto()
    STRUCTURAL = auto()
    SUM = auto()
    WAIT = auto()


class Slot(IntEnum):
    """Which number is being written: that of a field, of a site's row, or of an element's row."""

    FIELD = 0
    LABEL = auto()
    MULTIPLICITY = auto()
    X = auto()
    Y = auto()
    Z = auto()
    ELECTRONEGATIVITY = auto()
    RADIUS = auto()
    IONIC_RADIUS = auto()


class KindRow(NamedTuple):
    """How a kind begins, the bounds of its number in units of its last decimal, and the fewest tokens it takes."""

    node: Node
    low: int
    high: int
    decimals: int
    least_tokens: int


DECIMALS = 4
_UNIT = 10**DECIMALS
MAX_LENGTH = 1000  # Å, as validity has it
MIN_ANGLE, MAX_ANGLE = 10, 170  # degrees, as validity has it
# 200,000 Å^3 hold some 10,000 atoms, more than any context.
MAX_VOLUME = 200_000 * _UNIT - 1
MAX_MULTIPLICITY = 192
MAX_COORDINATE = _UNIT

_ANGLE = (MIN_ANGLE * _UNIT, MAX_ANGLE * _UNIT, DECIMALS)
KINDS = {
    Kind.EDGE: KindRow(Node.WHOLE, _UNIT // 2, MAX_LENGTH * _UNIT, DECIMALS, 6),
    Kind.SECOND: KindRow(Node.WHOLE, _UNIT // 2, MAX_LENGTH * _UNIT, DECIMALS, 6),
    Kind.THIRD: KindRow(Node.WHOLE, _UNIT // 2, MAX_LENGTH * _UNIT, DECIMALS, 6),
    Kind.ALPHA: KindRow(Node.WHOLE, *_ANGLE, 7),
    Kind.BETA: KindRow(Node.WHOLE, *_ANGLE, 7),
    # Alpha and beta may leave it angles of three digits alone.
    Kind.GAMMA: KindRow(Node.WHOLE, *_ANGLE, 8),
    # It may turn out to have all six digits.
    Kind.CELL_VOLUME: KindRow(Node.WHOLE, 1, MAX_VOLUME, DECIMALS, 11),
    Kind.VOLUME: KindRow(Node.WHOLE, 1, MAX_VOLUME, DECIMALS, 6),
    # At a level that knows the group the number is the group's, of up to three digits.
    Kind.NUMBER: KindRow(Node.WHOLE, 1, 230, 0, 3),
    Kind.UNITS: KindRow(Node.WHOLE, 1, 999, 0, 1),
    Kind.GROUP: KindRow(Node.GROUP, 0, 0, 0, 1),
    Kind.SITES: KindRow(Node.ELEMENT, 0, 0, 0, 0),
    Kind.DATA: KindRow(Node.DATA_FIRST, 0, 0, 0, 2),
    Kind.PROPERTIES: KindRow(Node.PROPERTY_FIRST, 0, 0, 0, 14),
    Kind.STRUCTURAL: KindRow(Node.STRUCTURAL_FIRST, 0, 0, 0, 1),
    Kind.SUM: KindRow(Node.SUM_FIRST, 0, 0, 0, 2),
    Kind.WAIT: KindRow(Node.WAITING, 0, 0, 0, 0),
}

_ELEMENT = tuple(TOKEN_ID[symbol] for symbol in ELEMENTS)
_NONZERO = DIGITS[1:]
_TAG = (TOKEN_ID[SPACEGROUP_TAG],)
_OPEN, _CLOSE, _QUOTE = ((TOKEN_ID[symbol],) for symbol in "()'")
_S, _N = (SPACE,), (NEWLINE,)

# Node: tokens and where they lead, the way to the end of the field first.
_GRAMMAR: dict[Node, tuple[tuple[tuple[int, ...], Node], ...]] = {
    Node.WAITING: ((_N, Node.WAITING),),
    Node.DONE: ((_N, Node.DONE),),
    Node.GROUP: ((tuple(TOKEN_ID[s + SPACEGROUP_SUFFIX] for s in SPACEGROUPS), Node.SCRIPT),),
    Node.ELEMENT: ((_N, Node.DONE), (_ELEMENT, Node.ELEMENT_GAP)),
    Node.ELEMENT_GAP: ((_S, Node.LABEL_ELEMENT),),
    Node.LABEL_ELEMENT: ((_ELEMENT, Node.WHOLE),),
    Node.GAP: ((_S, Node.WHOLE),),
    Node.OCCUPANCY: (((DIGITS[1],), Node.OCCUPANCY_POINT),),
    Node.OCCUPANCY_POINT: (((POINT,), Node.OCCUPANCY_ZERO),),
    Node.OCCUPANCY_ZERO: (((DIGITS[0],), Node.ROW_END),),
    Node.ROW_END: ((_N, Node.ELEMENT),),
    Node.DATA_FIRST: ((_ELEMENT, Node.DATA_ATOM),),
    Node.DATA_ATOM: ((_NONZERO, Node.DATA_DIGITS),),
    Node.DATA_DIGITS: ((_N, Node.FIELD_END), (DIGITS, Node.DATA_DIGITS), (_ELEMENT, Node.DATA_ATOM)),
    Node.PROPERTY_FIRST: ((_ELEMENT, Node.PROPERTY_GAP),),
    Node.PROPERTY_ROW: ((_TAG, Node.FIELD_END), (_ELEMENT, Node.PROPERTY_GAP)),
    Node.PROPERTY_GAP: ((_S, Node.WHOLE),),
    Node.STRUCTURAL_FIRST: ((_ELEMENT, Node.STRUCTURAL_ATOM),),
    Node.STRUCTURAL_ATOM: (
        (_N, Node.FIELD_END),
        (_NONZERO, Node.STRUCTURAL_DIGITS),
        (_ELEMENT, Node.STRUCTURAL_ATOM),
        (_OPEN, Node.BRACKET_FIRST),
    ),
    Node.STRUCTURAL_DIGITS: (
        (_N, Node.FIELD_END),
        (DIGITS, Node.STRUCTURAL_DIGITS),
        (_ELEMENT, Node.STRUCTURAL_ATOM),
        (_OPEN, Node.BRACKET_FIRST),
    ),
    Node.BRACKET_FIRST: ((_ELEMENT, Node.BRACKET_ATOM),),
    Node.BRACKET_ATOM: (
        (_CLOSE, Node.BRACKET_CLOSED),
        (_NONZERO, Node.BRACKET_DIGITS),
        (_ELEMENT, Node.BRACKET_ATOM),
    ),
    Node.BRACKET_DIGITS: (
        (_CLOSE, Node.BRACKET_CLOSED),
        (DIGITS, Node.BRACKET_DIGITS),
        (_ELEMENT, Node.BRACKET_ATOM),
    ),
    Node.BRACKET_CLOSED: ((_NONZERO, Node.STRUCTURAL_DIGITS),),
    Node.SUM_FIRST: ((_ELEMENT, Node.SUM_ATOM), (_QUOTE, Node.QUOTED_FIRST)),
    Node.SUM_ATOM: ((_NONZERO, Node.SUM_DIGITS),),
    Node.SUM_DIGITS: ((_N, Node.FIELD_END), (DIGITS, Node.SUM_DIGITS)),
    Node.QUOTED_FIRST: ((_ELEMENT, Node.QUOTED_ATOM),),
    Node.QUOTED_ATOM: ((_NONZERO, Node.QUOTED_DIGITS),),
    Node.QUOTED_DIGITS: (
        (_QUOTE, Node.QUOTED_CLOSED),
        (DIGITS, Node.QUOTED_DIGITS),
        (_S, Node.QUOTED_FIRST),
    ),
    Node.QUOTED_CLOSED: ((_N, Node.FIELD_END),),
}


class Tables(NamedTuple):
    """The grammar as arrays.

    Attributes:
        allowed: uint32 [nodes, WORDS]; tokens that the node allows, apart from what a row's registers say.
        closing: uint32 [nodes, WORDS]; those of them on the shortest way to the end of the field.
        target: int32 [nodes, V]; where a token leads.
        word: uint32 [V, WORDS]; each token as a set.
        group_number: int32 [V]; International Tables number of a space group's token, else 0.
        rank: int32 [V]; place of an element in the order of formulas from 1 on; 0 for those without one.
        after_rank: uint32 [ranks + 1, WORDS]; the tokens that may follow an element of that rank in a formula.
        unranked: int32 [V]; bit of an element without a rank, else 0.
        without: uint32 [8, WORDS]; all tokens but the unranked elements of these bits.
    """

    allowed: np.ndarray
    closing: np.ndarray
    target: np.ndarray
    word: np.ndarray
    group_number: np.ndarray
    rank: np.ndarray
    after_rank: np.ndarray
    unranked: np.ndarray
    without: np.ndarray


@cache
def tables() -> Tables:
    """The grammar as arrays, built once."""
    word = np.zeros((VOCABULARY, WORDS), np.uint32)
    ids = np.arange(VOCABULARY)
    word[ids, ids // WORD_BITS] = np.uint32(1) << (ids % WORD_BITS).astype(np.uint32)
    allowed = np.zeros((len(Node), WORDS), np.uint32)
    closing = np.zeros_like(allowed)
    target = np.zeros((len(Node), VOCABULARY), np.int32)
    for node, ways in _GRAMMAR.items():
        closing[node] = token_set(ways[0][0])
        for ids_of_way, to in ways:
            allowed[node] |= token_set(ids_of_way)
            target[node, list(ids_of_way)] = to
    group_number = np.zeros(VOCABULARY, np.int32)
    for symbol, number in SPACEGROUPS.items():
        group_number[TOKEN_ID[symbol + SPACEGROUP_SUFFIX]] = number
    ranked = sorted(
        (e for e in ELEMENTS.values() if e.symbol not in UNRANKED), key=lambda e: e.property_sort_key
    )
    order = [TOKEN_ID[element.symbol] for element in ranked]
    rank, unranked = np.zeros(VOCABULARY, np.int32), np.zeros(VOCABULARY, np.int32)
    rank[order] = np.arange(1, len(order) + 1)
    unranked[[TOKEN_ID[symbol] for symbol in UNRANKED]] = 1, 2, 4
    everything = token_set(range(VOCABULARY))
    return Tables(
        allowed=allowed,
        closing=closing,
        target=target,
        word=word,
        group_number=group_number,
        rank=rank,
        after_rank=np.stack([everything & ~token_set(order[:n]) for n in range(len(order) + 1)]),
        unranked=unranked,
        without=np.stack([everything & ~token_set(np.flatnonzero(unranked & bits)) for bits in range(8)]),
    )


def token_set(ids: Iterable[int]) -> np.ndarray:
    """A set of tokens as uint32 [WORDS]."""
    member = np.zeros(WORDS * WORD_BITS, bool)
    member[list(ids)] = True
    return np.packbits(member, bitorder="little").view("<u4").astype(np.uint32)
