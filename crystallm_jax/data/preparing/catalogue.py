"""The catalogue of a preparation under way: what became of each record, on disk, so that a killed run goes on.

A work folder holds `payload.bin`, the tokens or texts of all kept records one after another, and `catalogue.sqlite`,
a row a record. Both grow by whole batches: the payload is flushed first, the row transaction follows, and what a kill
leaves behind the last transaction is cut off when the folder is opened again. Memory does not grow with the records.
"""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from crystallm_jax.data.preparing.pipeline import Dropped, Outcome
from crystallm_jax.data.preparing.staging import make_folder, remove_empty, writing
from crystallm_jax.errors import DataError
from crystallm_jax.files import remove_leftovers

logger = logging.getLogger(__name__)

_CACHE_KIB = 65_536
_COLUMNS = "place, part, id, stage, reason, offset, length, formula, spacegroup, reduced, units, volume"
_TABLES = """
CREATE TABLE IF NOT EXISTS plan (text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    place INTEGER PRIMARY KEY,  -- number in the input
    part INTEGER NOT NULL,      -- which of the groups of inputs it came from
    id TEXT NOT NULL,
    stage TEXT, reason TEXT,    -- where and why it was dropped; NULL for a record that is kept
    offset INTEGER, length INTEGER,  -- of its payload, in bytes
    formula TEXT, spacegroup TEXT, reduced TEXT, units INTEGER, volume REAL
);
"""


class Row(NamedTuple):
    """One record as it came in, and what became of it."""

    part: int
    id: str
    outcome: Outcome


class Catalogue:
    """The work folder of one preparation; a context manager.

    Args:
        folder: made when missing. One that another plan left is begun anew: nothing in it is a user's.
        plan: all that rows and payload depend on, as JSON can hold it.

    Raises:
        DataError: another process works in the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(plan, sort_keys=True)
        with writing(folder.parent):
            self._made = make_folder(folder)
            self.connection = self._connect()
            self.begun_anew = self._plan() not in {None, text}
            if self.begun_anew:
                self._close()
                shutil.rmtree(folder)
                folder.mkdir()
                self.connection = self._connect()
            if self._plan() is None:
                self.connection.execute("INSERT INTO plan VALUES (?)", (text,))
                self.connection.commit()
            remove_leftovers(folder)  # of a run that was killed while it wrote the result
            # Places are the numbers from 0 on, so the greatest one tells how many there are, without a scan.
            self._count = self._scalar("SELECT COALESCE(MAX(place) + 1, 0) FROM records")
            self._size = self._scalar("SELECT COALESCE(MAX(offset + length), 0) FROM records")
            self._payload = (folder / "payload.bin").open("a+b")
            self._payload.truncate(self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = kind is None or self._holds_nothing()
        self._close()
        if done:
            self.remove()
        elif self.folder.exists():
            logger.info("%s: what is done is kept; the same command goes on there", self.folder.parent)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Iterable[Row]) -> None:
        """Add records behind those that are there, all or none of them.

        Raises:
            DataError: the disk is full.
        """
        place, offset = self._count, self._size
        values, payloads = [], []
        for row in rows:
            entry, payload = _entry(place, row, offset)
            values.append(entry)
            payloads.append(payload)
            place, offset = place + 1, offset + len(payload)
        with writing(self.folder.parent):
            self._payload.truncate(self._size)  # of what a failed attempt before wrote
            self._payload.write(b"".join(payloads))
            self._payload.flush()
            os.fsync(self._payload.fileno())
            with _database(self.folder):
                self.connection.executemany(
                    f"INSERT INTO records ({_COLUMNS}) VALUES ({','.join('?' * 12)})",  # noqa: S608  ours
                    values,
                )
                self.connection.commit()
        self._count, self._size = place, offset

    def read(self, offset: int, length: int) -> bytes:
        """A record's payload. Read, not mapped: pages of a mapped file count as the process's memory."""
        return os.pread(self._payload.fileno(), length, offset)

    def remove(self) -> None:
        """Remove the folder, and those above it that were made for it and are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_empty(self._made)

    def _connect(self) -> sqlite3.Connection:
        with _database(self.folder):
            connection = sqlite3.connect(self.folder / "catalogue.sqlite", timeout=1.0)
            # One process at a time, and no shared memory: that works on network file systems too.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            connection.execute("PRAGMA temp_store = FILE")
            # At once: of two runs that begin together one goes on. The lock stays after the transaction.
            connection.execute("BEGIN EXCLUSIVE")
            connection.executescript(_TABLES)
            if not (self.folder / "catalogue.sqlite").exists():  # it was waited for, and removed what it had
                connection.close()
                raise _other_run(self.folder)
        return connection

    def _holds_nothing(self) -> bool:
        # Asked of the file: an interrupt may come between a commit and the count of it.
        try:
            self.connection.rollback()
            return self.connection.execute("SELECT 1 FROM records LIMIT 1").fetchone() is None
        except sqlite3.Error:  # as of a full disk, whose error is on its way: keep what there is
            return False

    def _plan(self) -> str | None:
        row = self.connection.execute("SELECT text FROM plan").fetchone()
        return None if row is None else str(row[0])

    def _scalar(self, query: str) -> int:
        return int(self.connection.execute(query).fetchone()[0])

    def _close(self) -> None:
        self.connection.close()
        with contextlib.suppress(AttributeError, OSError):  # never opened; a full disk, which is told already
            self._payload.close()


def _entry(place: int, row: Row, offset: int) -> tuple[tuple[Any, ...], bytes]:
    key = row.outcome.key or (None,) * 5
    if isinstance(row.outcome, Dropped):
        stage, reason = row.outcome.stage, row.outcome.reason
        return (place, row.part, row.id, stage, reason, None, None, *key), b""
    return (place, row.part, row.id, None, None, offset, len(row.outcome.payload), *key), row.outcome.payload


@contextlib.contextmanager
def _database(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise _other_run(folder) from error
        raise OSError(f"its catalogue: {error}") from error
    except sqlite3.DatabaseError as error:
        raise DataError(f"{folder} is damaged ({error}): remove it and begin anew") from error


def _other_run(folder: Path) -> DataError:
    return DataError(f"another 'prepare' writes to {folder.parent}: wait for it, or give another --out")
