"""The journal of a sampling run: a line for each sample that has its verdict, so that a killed run can go on."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation import Judgement
from crystallm_jax.files import lock
from crystallm_jax.samples import Sample

# Digits behind the point of a log-probability in nats. What follows hangs on how many rows were decoded together: of
# 36 samples of the model in the package, 3 differed by 1e-4 between batches of 8 and of 64 after rounding to that.
LOG_PROB_DIGITS = 3


class Entry(NamedTuple):
    """A judged sample without its text, which is in its CIF.

    Attributes:
        prompt_index: which prompt.
        sample_index: which of its samples, from 0.
        tokens: of prompt and sample.
        generated_tokens: of the sample alone.
        finished: whether the text came to its end.
        log_prob: in nats.
        seconds: that the sample took.
        verdicts: the fields of its `ValidityReport`.
        frame: of the extxyz file.
        symmetrized: whether there is a symmetrised CIF.
        omitted: why frame or symmetrised CIF are missing.
        returns: how often the sample went back.
        unplaced: whether it was given up, as its atoms found no place.
    """

    prompt_index: int
    sample_index: int
    tokens: int
    generated_tokens: int
    finished: bool
    log_prob: float
    seconds: float
    verdicts: dict[str, Any]
    frame: str | None
    symmetrized: bool
    omitted: str | None
    returns: int = 0
    unplaced: bool = False


def entry_of(sample: Sample, *, prompt_tokens: int) -> Entry:
    """The entry of a sample whose prompt has so many tokens, before its verdict."""
    return Entry(
        prompt_index=sample.prompt_index,
        sample_index=sample.sample_index,
        tokens=len(sample.token_ids),
        generated_tokens=len(sample.token_ids) - prompt_tokens,
        finished=sample.finished,
        log_prob=round(sample.log_prob, LOG_PROB_DIGITS),
        seconds=round(sample.seconds, 3),
        verdicts={},
        frame=None,
        symmetrized=False,
        omitted=None,
        returns=sample.returns,
        unplaced=sample.unplaced,
    )


def judged_entry(entry: Entry, judgement: Judgement) -> Entry:
    """The entry with its verdict."""
    return entry._replace(
        verdicts=asdict(judgement.report),
        frame=judgement.frame,
        symmetrized=judgement.symmetrized is not None,
        omitted=judgement.omitted,
    )


class Journal:
    """Appends entries to a file, which this process alone may do while it is open.

    Args:
        path: of the file, made when missing. A torn line at its end, which a kill leaves, is cut off.

    Raises:
        SamplingError: another process has it open.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: what a full disk refused must not be tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file, path)
            self._size = _whole_bytes(path)
            self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Entry) -> None:
        """Add an entry; it is with the operating system on return.

        Raises:
            OSError: it cannot be written; nothing of it is there.
        """
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def read_entries(path: Path) -> Iterator[tuple[int, Entry]]:
    """The entries of a journal, each with its place in bytes, up to the first line that is not whole."""
    with path.open("rb") as file:
        place = 0
        for line in file:
            entry = _entry(line)
            if entry is None:
                return
            yield place, entry
            place += len(line)


def parse_entry(line: bytes) -> Entry:
    """The entry of a whole line.

    Raises:
        ValueError: the line is not whole.
    """
    if not line.endswith(b"\n"):
        raise ValueError("a torn line")
    values = json.loads(line)
    if not isinstance(values, list) or len(values) != len(Entry._fields):
        raise ValueError("another kind of line")
    return Entry(*values)


def _entry(line: bytes) -> Entry | None:
    try:
        return parse_entry(line)
    except ValueError:  # what a kill or a power failure left; the sample is made again
        return None


def _whole_bytes(path: Path) -> int:
    """The length of what can be read of a journal."""
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if _entry(line) is None:
                break
            whole += len(line)
    return whole


def _lock(file: IO[bytes], path: Path) -> None:
    # Where the file system has no locks, nothing is held.
    with contextlib.suppress(OSError):
        if not lock(file):
            raise SamplingError(
                f"{path.parent}: another run samples into it: wait for it, or choose another --out"
            )
