"""Writing a prepared folder: tokens (`StoreWriter`) or, where preparation ends before them, texts (`TextWriter`)."""

import array
import csv
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.cif.vocabulary import vocabulary_sha256
from crystallm_jax.data.preparing.staging import Staging, writing
from crystallm_jax.data.store import FORMAT, SPLITS, TOKEN_DTYPE, SplitHeader, StoreHeader
from crystallm_jax.errors import DataError

_TOKEN_PARTS = ("bin", "starts.npy", "underrep.npy", "ids.txt")
_TEXT_PARTS = ("jsonl.gz",)
_COMPRESSION = 6
WORK_FOLDER = ".prepare"
"""Where, in the folder to write, an unfinished run keeps what it has done."""
PREPARED_NAMES = tuple(f"{split}.{part}" for split in SPLITS for part in (*_TOKEN_PARTS, *_TEXT_PARTS))
"""The files that a run replaces or, where it does not write them, removes."""


class _Folder:
    """What both kinds of folder have: `dropped.csv`, `meta.json`, and none of an earlier run's files."""

    def __init__(self, folder: str | Path, work: Path | None = None) -> None:
        self.folder = Path(folder)
        refuse_foreign(self.folder)
        self._staging = Staging(folder, work)
        self._written: set[str] = set()
        self._dropped = csv.writer(self._staging.text("dropped.csv"), lineterminator="\n")
        self._dropped.writerow(("id", "stage", "reason"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.__exit__(kind, error, trace)

    def drop(self, record_id: str, stage: str, reason: str) -> None:
        """Note an input that is not kept, with the stage that refused it and why."""
        with writing(self.folder):
            self._dropped.writerow((record_id, stage, reason))

    def _publish(self, meta: str) -> None:
        """Give the files their names, `meta.json` last."""
        with writing(self.folder):
            self._staging.text("meta.json").write(meta)
        self._staging.publish(remove=tuple(name for name in PREPARED_NAMES if name not in self._written))


class StoreWriter(_Folder):
    """Writes a token store; a context manager that leaves nothing behind unless `commit` was reached.

    Tokens and ids go to disk at once; of a record 8 bytes stay in memory. Files that are being written lie in `work`,
    a folder on the same disk, or in the store's own.
    """

    def __init__(self, folder: str | Path, work: Path | None = None) -> None:
        super().__init__(folder, work)
        tokenizer = CIFTokenizer()
        self._unk_id, self._vocab_size = tokenizer.unk_id, tokenizer.vocab_size
        self._splits: dict[str, _Split] = {}

    def add(
        self, record_id: str, tokens: np.ndarray, *, split: str = "train", underrepresented: bool = False
    ) -> None:
        """Append a record to a split; tokens is [T] of integer ids.

        Raises:
            DataError: an id of several lines, or the disk is full.
        """
        if any(c in "\r\n" or "\ud800" <= c <= "\udfff" for c in record_id):
            raise DataError(f"the id {record_id[:40]!r} has several lines or is no Unicode: give another")
        if split not in self._splits:
            self._splits[split] = _Split(split, self._staging)
        with writing(self.folder):
            self._splits[split].add(record_id, np.asarray(tokens, TOKEN_DTYPE), self._unk_id)
        if underrepresented:
            self._splits[split].underrepresented.append(self._splits[split].starts[-1])

    def add_payload(self, record_id: str, payload: bytes, *, split: str, underrepresented: bool) -> None:
        """Append a record as a catalogue holds it: token ids, little-endian uint16."""
        tokens = np.frombuffer(payload, TOKEN_DTYPE)
        self.add(record_id, tokens, split=split, underrepresented=underrepresented)

    def commit(
        self,
        *,
        sources: Sequence[str],
        options: Mapping[str, Any],
        counts: Mapping[str, int],
        versions: Mapping[str, str],
    ) -> StoreHeader:
        """Give the files their names, `meta.json` last.

        Args:
            sources: the inputs, as the user named them.
            options: what the records depend on.
            counts: how many records came in, stayed and were dropped.
            versions: of the libraries that took part.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        headers = {}
        for name in (name for name in SPLITS if name in self._splits):
            split = self._splits[name]
            headers[name] = split.header()
            with writing(self.folder):
                np.save(self._staging.binary(f"{name}.starts.npy"), np.asarray(split.starts))
                if split.underrepresented:
                    marks = np.asarray(split.underrepresented)
                    np.save(self._staging.binary(f"{name}.underrep.npy"), marks)
                    self._written.add(f"{name}.underrep.npy")
            self._written |= {f"{name}.bin", f"{name}.ids.txt", f"{name}.starts.npy"}
        header = StoreHeader(
            FORMAT,
            self._vocab_size,
            vocabulary_sha256(),
            headers,
            tuple(sources),
            options,
            counts,
            versions,
            "crystallm",
        )
        self._publish(header.to_json())
        return header


class TextWriter(_Folder):
    """Writes texts as `SPLIT.jsonl.gz`, a JSON object with `id` and `cif` a line; a context manager likewise."""

    def __init__(self, folder: str | Path, work: Path | None = None) -> None:
        super().__init__(folder, work)
        self._files: dict[str, gzip.GzipFile] = {}
        self._counts: dict[str, int] = {}

    def add(self, record_id: str, text: str, *, split: str = "train", underrepresented: bool = False) -> None:
        """Append a record to a split."""
        if split not in self._files:
            name = f"{split}.jsonl.gz"
            # Neither a name nor a time goes into the file: the same records are the same bytes.
            stream = self._staging.binary(name)
            self._files[split] = gzip.GzipFile("", "wb", _COMPRESSION, stream, mtime=0)
            self._written.add(name)
        self._counts[split] = self._counts.get(split, 0) + 1
        mark = {"underrepresented": True} if underrepresented else {}
        line = json.dumps({"id": record_id, "cif": text, **mark}, ensure_ascii=False) + "\n"
        with writing(self.folder):
            self._files[split].write(line.encode())

    def add_payload(self, record_id: str, payload: bytes, *, split: str, underrepresented: bool) -> None:
        """Append a record as a catalogue holds it: text in UTF-8."""
        self.add(record_id, payload.decode(), split=split, underrepresented=underrepresented)

    def commit(
        self,
        *,
        sources: Sequence[str],
        options: Mapping[str, Any],
        counts: Mapping[str, int],
        versions: Mapping[str, str],
    ) -> dict[str, int]:
        """Give the files their names, `meta.json` last; returns the records of each split.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        with writing(self.folder):
            for stream in self._files.values():
                stream.close()
        meta = {
            "texts": self._counts,
            "sources": list(sources),
            "options": dict(options),
            "counts": dict(counts),
            "versions": dict(versions),
            "created_by": "crystallm",
        }
        self._publish(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        return {name: self._counts[name] for name in SPLITS if name in self._counts}


class _Split:
    """One split of a store that is being written."""

    def __init__(self, name: str, staging: Staging) -> None:
        self._stream = staging.binary(f"{name}.bin")
        self._ids = staging.text(f"{name}.ids.txt")
        self._digest = hashlib.sha256()
        self._tokens = self._longest = self._unk = 0
        self.starts = array.array("q")
        self.underrepresented = array.array("q")

    def add(self, record_id: str, tokens: np.ndarray, unk_id: int) -> None:
        data = tokens.tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._ids.write(f"{record_id}\n")
        self.starts.append(self._tokens)
        self._tokens += len(tokens)
        self._longest = max(self._longest, len(tokens))
        self._unk += int(np.count_nonzero(tokens == unk_id))

    def header(self) -> SplitHeader:
        return SplitHeader(len(self.starts), self._tokens, self._longest, self._digest.hexdigest(), self._unk)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder with our files' names that `prepare` did not write; one that it wrote is replaced.

    Raises:
        DataError: such a folder, or a file in its place.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: give --out a folder")
    # A run that was killed between two names, on its first time there, left no meta.json but its work folder.
    if not folder.is_dir() or (folder / WORK_FOLDER).is_dir() or _is_ours(folder / "meta.json"):
        return
    for name in ("meta.json", "dropped.csv", *PREPARED_NAMES):
        if (folder / name).exists():
            raise DataError(f"{folder} already has a {name} that 'prepare' did not write: give another --out")


def _is_ours(meta: Path) -> bool:
    """Whether a `meta.json` says that it is ours; one that is cut short is not."""
    try:
        header = json.loads(meta.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(header, dict) and header.get("created_by") == "crystallm"
