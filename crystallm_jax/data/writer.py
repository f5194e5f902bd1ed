"""Writing a prepared folder: every file has a temporary name until all of them are there."""

import array
import contextlib
import csv
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.cif.vocabulary import vocabulary_sha256
from crystallm_jax.data.store import FORMAT, SPLITS, TOKEN_DTYPE, SplitHeader, StoreHeader
from crystallm_jax.errors import DataError

_COPY_RECORDS = 4096
_PARTS = ("bin", "starts.npy", "ids.txt")


class StoreWriter:
    """Writes one prepared folder; a context manager that leaves nothing behind unless `commit` was reached.

    Records are appended to one stream; `commit` says which of them go to which split. Tokens never stay in
    memory, only offsets and ids do.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.ids: list[str] = []
        self.n_dropped = 0
        self._starts = array.array("q", [0])
        self._temporary: dict[Path, Path] = {}
        self._open_files = contextlib.ExitStack()
        self._digest = hashlib.sha256()
        self._unk = array.array("q")
        tokenizer = CIFTokenizer()
        self._unk_id, self._vocab_size = tokenizer.unk_id, tokenizer.vocab_size
        _refuse_foreign(self.folder)
        with self._writing():
            self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._open_files.enter_context(self._temporary_name("train.bin").open("wb"))
            dropped: TextIO = self._open_files.enter_context(
                self._temporary_name("dropped.csv").open("w", encoding="utf-8", newline="")
            )
        self._dropped = csv.writer(dropped, lineterminator="\n")
        self._dropped.writerow(("id", "stage", "reason"))

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(
            OSError
        ):  # A full disk also fails the last flush; its error is already on its way.
            self._open_files.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)
        if not (self.folder / "meta.json").exists():
            for path in self._made:
                with contextlib.suppress(OSError):  # not empty: someone else put something there
                    path.rmdir()

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, record_id: str, tokens: np.ndarray) -> None:
        """Append a record; tokens is [T] of integer ids."""
        ids = np.asarray(tokens, dtype=TOKEN_DTYPE)
        data = ids.tobytes()
        with self._writing():
            self._stream.write(data)
        self._digest.update(data)
        self.ids.append(record_id)
        self._starts.append(self._starts[-1] + len(ids))
        self._unk.append(int(np.count_nonzero(ids == self._unk_id)))

    def drop(self, record_id: str, stage: str, reason: str) -> None:
        """Note an input that is not kept, with the stage that refused it and why."""
        self.n_dropped += 1
        with self._writing():
            self._dropped.writerow((record_id, stage, reason))

    def commit(
        self,
        splits: Mapping[str, np.ndarray],
        *,
        sources: tuple[str, ...],
        options: Mapping[str, Any],
        counts: Mapping[str, int],
        versions: Mapping[str, str],
    ) -> StoreHeader:
        """Give the files their names, `meta.json` last.

        Args:
            splits: for each split, the numbers of its records, rising, int64 [records].
            sources: the inputs, as the user named them.
            options: what the records depend on.
            counts: how many records came in, stayed and were dropped.
            versions: of the libraries that took part.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        with self._writing():
            self._open_files.close()
            whole = np.arange(len(self.ids))
            untouched = list(splits) == ["train"] and np.array_equal(splits["train"], whole)
            headers = (
                {"train": self._header(whole, self._digest.hexdigest())}
                if untouched
                else self._distribute(splits)
            )
            for name, rows in splits.items():
                self._write_index(name, rows)
            header = StoreHeader(
                FORMAT,
                self._vocab_size,
                vocabulary_sha256(),
                headers,
                sources,
                options,
                counts,
                versions,
                "crystallm",
            )
            self._temporary_name("meta.json").write_text(header.to_json(), encoding="utf-8")
            self._rename(set(splits))
        return header

    def _distribute(self, splits: Mapping[str, np.ndarray]) -> dict[str, SplitHeader]:
        """Copy the stream's records to their splits; the stream itself goes."""
        source = self.folder / f".stream.tmp-{os.getpid()}"
        written = next(path for path, final in self._temporary.items() if final.name == "train.bin")
        written.replace(source)
        self._temporary = {p: final for p, final in self._temporary.items() if p != written} | {
            source: source
        }
        tokens = np.memmap(source, dtype=TOKEN_DTYPE, mode="r")
        headers = {}
        for name, rows in splits.items():
            digest = hashlib.sha256()
            with self._temporary_name(f"{name}.bin").open("wb") as stream:
                for begin in range(0, len(rows), _COPY_RECORDS):
                    piece = rows[begin : begin + _COPY_RECORDS]
                    data = b"".join(tokens[self._starts[i] : self._starts[i + 1]].tobytes() for i in piece)
                    stream.write(data)
                    digest.update(data)
            headers[name] = self._header(rows, digest.hexdigest())
        return headers

    def _header(self, rows: np.ndarray, sha256: str) -> SplitHeader:
        lengths = np.diff(np.asarray(self._starts))[rows]
        unk = int(np.asarray(self._unk, dtype=np.int64)[rows].sum())
        return SplitHeader(len(rows), int(lengths.sum()), int(lengths.max(initial=0)), sha256, unk)

    def _write_index(self, split: str, rows: np.ndarray) -> None:
        lengths = np.diff(np.asarray(self._starts))[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        with self._temporary_name(f"{split}.starts.npy").open("wb") as stream:
            np.save(stream, starts, allow_pickle=False)
        with self._temporary_name(f"{split}.ids.txt").open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{self.ids[i]}\n" for i in rows)

    def _rename(self, splits: set[str]) -> None:
        for path, final in self._temporary.items():
            if path != final:
                _flush(path)
        for path, final in self._temporary.items():
            if path == final:
                path.unlink()
            else:
                path.replace(final)  # meta.json is the last one added
        self._temporary = {}
        for name in (n for n in SPLITS if n not in splits):
            for part in _PARTS:
                (self.folder / f"{name}.{part}").unlink(missing_ok=True)

    def _temporary_name(self, name: str) -> Path:
        path = self.folder / f".{name}.tmp-{os.getpid()}"
        self._temporary[path] = self.folder / name
        return path

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free
            reason = error.strerror or str(error)
            raise DataError(
                f"{self.folder} cannot be written ({reason}; {free >> 20:,} MiB free): give another --out"
            ) from error


def _refuse_foreign(folder: Path) -> None:
    """An earlier prepared folder is replaced, anything else that has our files' names is not."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: give --out a folder")
    if not (folder / "meta.json").is_file():
        present = [name for name in SPLITS if (folder / f"{name}.bin").exists()]
        if present:
            raise DataError(
                f"{folder} already has a {present[0]}.bin that 'prepare' did not write: give another --out"
            )


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
