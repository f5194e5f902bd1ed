"""Which of the records stay and where they go: what is decided over all records, as queries over the catalogue.

Sets are compared by what the texts state: cell formula, space group, formula units, volume. Memory does not grow with
the records but for 8 to 16 bytes each, for the order in which they are written.
"""

import dataclasses
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from crystallm_jax.data.preparing.splits import PUBLISHED_SEED, Split, SplitBy, split_rows
from crystallm_jax.data.store import SPLITS
from crystallm_jax.errors import ConfigError, DataError

REFERENCE = len(SPLITS)
"""The part of the inputs that are read only to be excluded; those before are the splits."""

_WORK_TABLES = """
DROP TABLE IF EXISTS drops; DROP TABLE IF EXISTS names; DROP TABLE IF EXISTS ranks; DROP TABLE IF EXISTS marks;
DROP VIEW IF EXISTS kept;
CREATE TABLE drops (place INTEGER PRIMARY KEY, stage TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE names (place INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE ranks (place INTEGER PRIMARY KEY, rank INTEGER NOT NULL);
CREATE TABLE marks (place INTEGER PRIMARY KEY);
CREATE VIEW kept AS SELECT records.* FROM records LEFT JOIN drops USING (place)
    WHERE drops.place IS NULL AND part < {reference};
CREATE INDEX IF NOT EXISTS record_ids ON records (id);
INSERT INTO drops SELECT place, stage, reason FROM records WHERE stage IS NOT NULL AND part < {reference};
"""
_NAME = "COALESCE((SELECT name FROM names WHERE names.place = {0}.place), {0}.id)"
_DROP_WITHOUT_KEY = """
INSERT INTO drops SELECT place, :stage, 'the text does not state all of cell formula, space group, formula units and '
    || 'volume, by which records are compared: leave out --' || :stage FROM kept WHERE formula IS NULL
"""
_DROP_LATER = """
INSERT INTO drops SELECT place, 'merge', 'same reduced formula, units and space group as ''' || first || '''' FROM (
    SELECT place, ROW_NUMBER() OVER key AS n, FIRST_VALUE({name}) OVER key AS first FROM kept
    WINDOW key AS (PARTITION BY reduced, units, spacegroup ORDER BY place)) WHERE n > 1
"""
_DROP_LARGER = """
INSERT INTO drops SELECT place, 'dedup', 'same cell formula and space group as ''' || first || '''' FROM (
    SELECT place, ROW_NUMBER() OVER key AS n, FIRST_VALUE({name}) OVER key AS first FROM kept
    WINDOW key AS (PARTITION BY formula, spacegroup ORDER BY volume / MAX(units, 1), place)) WHERE n > 1
"""
_RANK = """
INSERT INTO ranks SELECT place, MIN(place) OVER (PARTITION BY formula, spacegroup) FROM kept
"""
_DROP_EXCLUDED = """
INSERT INTO drops SELECT kept.place, 'exclude', '{what} as ''' || ref.id || ''', which is to be excluded' FROM kept
JOIN (SELECT {columns}, id, MIN(place) FROM records WHERE part = {reference} AND formula IS NOT NULL GROUP BY {columns})
AS ref USING ({columns})
"""
_MARK_PAIRS_TABLES = (
    "DROP TABLE IF EXISTS wanted",
    "DROP TABLE IF EXISTS members",
    "CREATE TEMP TABLE wanted (formula TEXT, spacegroup TEXT)",
    "CREATE TEMP TABLE members (place INTEGER PRIMARY KEY)",
)
_MARK_PAIRS = """
INSERT OR IGNORE INTO marks
SELECT place FROM kept WHERE (formula, spacegroup) IN (SELECT formula, spacegroup FROM wanted)
"""
_MARK_RARE = """
INSERT OR IGNORE INTO marks
SELECT place FROM (SELECT place, COUNT(*) OVER (PARTITION BY spacegroup) AS n FROM members JOIN records USING (place))
WHERE n < ?
"""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is decided over all records, in this order.

    Attributes:
        merge: of records with the same (reduced formula, formula units, space group) the first stays, as in the
            published merging of data sets.
        exclude_by: what makes a record one of those to exclude: the same `structure` (reduced formula, formula units,
            space group), as published, or the same reduced `formula`, so that no polymorph stays either.
        dedup: of records with the same (cell formula, space group) the one with the lowest volume a formula unit stays,
            the first of equals. As published, it stands where the first of them stood.
        split: how what is left is divided; None puts the inputs into the sets that they were given for.
        underrepresented_below: records whose space group has fewer records than this in its set are marked as
            under-represented; None marks none by that.
        shuffle: write each set in an order drawn from the seed (as published, where it was not seeded); otherwise in
            the order of the input.
        seed: of the split and the order.
    """

    merge: bool = False
    exclude_by: Literal["structure", "formula"] = "structure"
    dedup: bool = False
    split: Split | None = None
    underrepresented_below: int | None = None
    shuffle: bool = False
    seed: int = PUBLISHED_SEED

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed}: give one from 0 to 2^32 - 1")
        if self.underrepresented_below is not None and self.underrepresented_below < 1:
            raise ConfigError(
                f"underrepresented below {self.underrepresented_below}: give a number of at least 1"
            )


class Pair(NamedTuple):
    """A cell formula and a space group whose records are under-represented."""

    formula: str
    spacegroup: str


def select(connection: sqlite3.Connection, selection: Selection) -> Mapping[str, np.ndarray]:
    """Decide which records stay: for each set the places of its records, int64, in the order to be written.

    What is dropped stands in the table `drops`, changed ids in `names`; nothing is committed.

    Raises:
        DataError: a set would be empty, or nothing has a key by which to divide.
    """
    connection.execute("BEGIN")
    for statement in _WORK_TABLES.format(reference=REFERENCE).split(";\n"):
        for one in filter(str.strip, statement.split(";")):
            connection.execute(one)
    _make_ids_unique(connection)
    name = _NAME.format("kept")
    if selection.merge:
        connection.execute(_DROP_WITHOUT_KEY, {"stage": "merge"})
        connection.execute(_DROP_LATER.format(name=name))
    _exclude(connection, selection)
    if selection.dedup:
        connection.execute(_DROP_WITHOUT_KEY, {"stage": "dedup"})
        connection.execute(_RANK)
        connection.execute(_DROP_LARGER.format(name=name))
    sets = _divide(connection, selection)
    if selection.shuffle:
        seeds = np.random.SeedSequence(selection.seed).spawn(len(SPLITS))
        order = dict(zip(SPLITS, seeds, strict=True))
        sets = {split: np.random.default_rng(order[split]).permutation(rows) for split, rows in sets.items()}
    return sets


def mark(
    connection: sqlite3.Connection,
    sets: Mapping[str, np.ndarray],
    pairs: Iterable[Pair],
    *,
    below: int | None,
) -> int:
    """Mark under-represented records; returns how many are.

    Args:
        connection: of the catalogue, after `select`.
        sets: the places of each set's records.
        pairs: those whose records are marked, wherever they stand.
        below: marks the records whose space group has fewer records than this in their set.
    """
    for statement in _MARK_PAIRS_TABLES:
        connection.execute(statement)
    connection.executemany("INSERT INTO wanted VALUES (?, ?)", pairs)
    connection.execute("CREATE INDEX temp.wanted_pairs ON wanted (formula, spacegroup)")
    connection.execute(_MARK_PAIRS)
    if below is not None:
        for rows in sets.values():
            connection.execute("DELETE FROM members")
            connection.executemany("INSERT INTO members VALUES (?)", ((int(row),) for row in rows))
            connection.execute(_MARK_RARE, (below,))
    return _number(connection, "SELECT COUNT(*) FROM marks")


class Selected(NamedTuple):
    """A record to write: its id, its payload's place, and whether it is under-represented."""

    id: str
    offset: int
    length: int
    underrepresented: bool


def selected(connection: sqlite3.Connection, rows: np.ndarray) -> Iterator[Selected]:
    """The records at these places, in their order."""
    query = (
        f"SELECT {_NAME.format('records')}, offset, length,"  # noqa: S608  ours
        " EXISTS (SELECT 1 FROM marks WHERE marks.place = records.place) FROM records WHERE place = ?"
    )
    for row in rows:
        name, offset, length, marked = connection.execute(query, (int(row),)).fetchone()
        yield Selected(name, offset, length, bool(marked))


class Drop(NamedTuple):
    """A record that is not kept."""

    id: str
    stage: str
    reason: str


def dropped(connection: sqlite3.Connection) -> Iterator[Drop]:
    """What is not kept, in the order of the input."""
    query = (
        f"SELECT {_NAME.format('records')}, drops.stage, drops.reason FROM drops"  # noqa: S608  ours
        " JOIN records USING (place) ORDER BY place"
    )
    yield from (Drop(*row) for row in connection.execute(query))


def unusable_references(connection: sqlite3.Connection) -> Iterator[Drop]:
    """Records of the set to exclude that have no key, so that nothing can be excluded by them."""
    query = (
        "SELECT id, COALESCE(stage, 'exclude'), COALESCE(reason, 'the text states no key') FROM records"
        " WHERE part = ? AND formula IS NULL ORDER BY place"
    )
    yield from (Drop(*row) for row in connection.execute(query, (REFERENCE,)))


def count_references(connection: sqlite3.Connection) -> int:
    """Records of the set to exclude."""
    return _number(connection, f"SELECT COUNT(*) FROM records WHERE part = {REFERENCE}")  # noqa: S608


def count_drops(connection: sqlite3.Connection) -> int:
    """Records that are not kept."""
    return _number(connection, "SELECT COUNT(*) FROM drops")


def _make_ids_unique(connection: sqlite3.Connection) -> None:
    """A repeated id is followed by `_2`, `_3` and so on; a name that some record has of itself is passed over."""
    repeats = connection.execute(
        "SELECT place, id, n FROM (SELECT place, id, ROW_NUMBER() OVER (PARTITION BY id ORDER BY place) AS n"
        " FROM records WHERE part < ?) WHERE n > 1 ORDER BY place",
        (REFERENCE,),
    )
    taken = "SELECT 1 FROM records WHERE id = :name UNION ALL SELECT 1 FROM names WHERE name = :name LIMIT 1"
    for place, base, number in repeats:
        n = number
        while connection.execute(taken, {"name": f"{base}_{n}"}).fetchone():
            n += 1
        connection.execute("INSERT INTO names VALUES (?, ?)", (place, f"{base}_{n}"))


def _exclude(connection: sqlite3.Connection, selection: Selection) -> None:
    if connection.execute("SELECT 1 FROM records WHERE part = ? LIMIT 1", (REFERENCE,)).fetchone() is None:
        return
    what, columns = {
        "structure": ("same reduced formula, units and space group", "reduced, units, spacegroup"),
        "formula": ("same reduced formula", "reduced"),
    }[selection.exclude_by]
    connection.execute(_DROP_WITHOUT_KEY, {"stage": "exclude"})
    connection.execute(_DROP_EXCLUDED.format(what=what, columns=columns, reference=REFERENCE))


def _divide(connection: sqlite3.Connection, selection: Selection) -> Mapping[str, np.ndarray]:
    ordered = "FROM kept LEFT JOIN ranks USING (place) {where} ORDER BY COALESCE(rank, place)"
    if selection.split is None:
        sets = {}
        for part, name in enumerate(SPLITS):
            rows = _column(connection, f"SELECT place {ordered.format(where='WHERE part = ?')}", part)
            size = connection.execute("SELECT COUNT(*) FROM records WHERE part = ?", (part,)).fetchone()[0]
            if size and not len(rows) and part:
                raise DataError(f"none of the {size:,} records of the {name} set can be kept: see its inputs")
            if len(rows):
                sets[name] = rows
        return sets
    rows = _column(connection, f"SELECT place {ordered.format(where='')}")
    groups = None
    if selection.split.by != "random":
        connection.execute(_DROP_WITHOUT_KEY, {"stage": "split-by"})
        rows = _column(connection, f"SELECT place {ordered.format(where='')}")
        groups = _groups(connection, selection.split.by, rows)
    return split_rows(rows, selection.split, seed=selection.seed, groups=groups) if len(rows) else {}


def _groups(connection: sqlite3.Connection, by: SplitBy, rows: np.ndarray) -> np.ndarray:
    """A number for the reduced formula or the space group of each row, int64 [N]."""
    column = {"formula": "reduced", "spacegroup": "spacegroup"}[by]
    numbered = f"SELECT place, DENSE_RANK() OVER (ORDER BY {column}) FROM kept ORDER BY place"  # noqa: S608
    pairs = np.fromiter(connection.execute(numbered), np.dtype((np.int64, 2)))
    return pairs[np.searchsorted(pairs[:, 0], rows), 1]


def _column(connection: sqlite3.Connection, query: str, *values: int) -> np.ndarray:
    return np.fromiter((value for (value,) in connection.execute(query, values)), np.int64)


def _number(connection: sqlite3.Connection, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])
