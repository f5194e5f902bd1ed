"""The folder of a sampling run: what may be begun or gone on with there, and files that appear when they are whole."""

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from crystallm_jax.errors import SamplingError
from crystallm_jax.files import new_file, remove_leftovers, write_errors
from crystallm_jax.sample_run.journal import Entry, Journal, read_entries
from crystallm_jax.sample_run.settings import difference
from crystallm_jax.sampling.prompts import Prompt

CIF_FOLDER = "cifs"
SYMMETRIZED_FOLDER = "symmetrized"
TABLE_FILE = "samples.csv"
STRUCTURES_FILE = "structures.extxyz"
RUN_FILE = "run.json"
SETTINGS_FILE = "settings.json"

_JOURNALS = "journal-*.jsonl"
_SAMPLE_FILE = re.compile(r"(.+)__([0-9]+)\.cif")


def file_name(prompt: Prompt, sample_index: int) -> str:
    """`ID__N.cif`, N counted from 1."""
    return f"{prompt.id}__{sample_index + 1}.cif"


class ResultsFolder:
    """Where a sampling run is written; every file appears under its name when it is complete.

    Args:
        path: the folder, new or without samples.
        part: which process of the run this is; each has its own journal there.
        parts: how many there are.
        resume: `True` goes on with what a run left there, if one did.

    Raises:
        SamplingError: samples are there already, or cannot be gone on with, or the disk takes no more.
    """

    def __init__(self, path: str | Path, *, part: int = 0, parts: int = 1, resume: bool = False) -> None:
        self.path = Path(path)
        self.part, self.parts = part, parts
        self._journal: Journal | None = None
        self._begun = (self.path / SETTINGS_FILE).exists()
        if self._holds_samples() and not resume:
            mend = "choose another --out or remove them" + ("; --resume goes on with them" * self._begun)
            raise SamplingError(f"{self.path}: holds samples already; {mend}")
        if self._holds_samples() and not self._begun:
            raise SamplingError(
                f"{self.path}: holds samples but no {SETTINGS_FILE}, so that no run can go on with them;"
                " choose another --out"
            )
        try:
            for name in (CIF_FOLDER, SYMMETRIZED_FOLDER):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SamplingError(f"{self.path}: cannot be made: {error.strerror}") from None

    @property
    def begun(self) -> bool:
        """Whether samples of this run can be there."""
        return self._begun

    @property
    def finished(self) -> bool:
        """Whether a run came to its end there."""
        return self._begun and (self.path / RUN_FILE).exists() and not self.journals()

    def journals(self) -> list[Path]:
        """The journals of all parts that are there."""
        return sorted(self.path.glob(_JOURNALS))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Make sure that these are the settings that the run was begun with.

        Raises:
            SamplingError: they are not.
        """
        path = self.path / SETTINGS_FILE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise SamplingError(f"{path}: cannot be read; choose another --out") from None
        differing = difference(before, settings)
        if differing is not None:
            raise SamplingError(
                f"{self.path}: was begun with {differing}: give what it was begun with, or another --out"
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make ready to take samples: state the settings, or compare them with those stated, and open the journal.

        Raises:
            SamplingError: other settings, another run that is under way there, or a disk that takes no more.
        """
        if self._journal is not None:
            return
        if (self.path / SETTINGS_FILE).exists():
            self.check(settings)
        else:
            self.write(SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        self._begun = True
        path = self.path / f"journal-{self.part}.jsonl"
        with write_errors(path, SamplingError):
            self._journal = Journal(path)

    def append(self, entry: Entry) -> None:
        """Add to the journal.

        Raises:
            SamplingError: the disk takes no more.
        """
        if self._journal is None:
            raise RuntimeError("the folder was not begun")
        with write_errors(self._journal.path, SamplingError):
            self._journal.append(entry)

    def entries(self, prompts: Collection[Prompt]) -> Iterator[Entry]:
        """What the journals hold, but for samples whose CIF is not there."""
        named = list(prompts)
        for path in self.journals():
            for _, entry in read_entries(path):
                name = file_name(named[entry.prompt_index], entry.sample_index)
                files = [CIF_FOLDER] + [SYMMETRIZED_FOLDER] * entry.symmetrized
                if all(_holds(self.path / folder / name) for folder in files):
                    yield entry

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def remove_journals(self) -> None:
        """Remove the journals, once their samples are in the tables."""
        self.close()
        for path in self.journals():
            path.unlink(missing_ok=True)

    def remove_others(self, prompts: Collection[Prompt], kept: Collection[str]) -> None:
        """Remove the files of these prompts' samples whose names are not among those kept, and what kills left."""
        names = {prompt.id for prompt in prompts}
        remove_leftovers(self.path)
        for folder in (CIF_FOLDER, SYMMETRIZED_FOLDER):
            remove_leftovers(self.path / folder)
            for path in (self.path / folder).iterdir():
                match = _SAMPLE_FILE.fullmatch(path.name)
                if match and match[1] in names and path.name not in kept:
                    path.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a file.

        Raises:
            SamplingError: the disk takes no more.
        """
        with self.becoming(name) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def becoming(self, name: str) -> Iterator[Path]:
        """A temporary name, renamed when all is written.

        Raises:
            SamplingError: the disk takes no more.
        """
        path = self.path / name
        # What a power failure takes of a run, the run makes again.
        with new_file(path, SamplingError, synced=False) as partial:
            yield partial

    def _holds_samples(self) -> bool:
        files = (TABLE_FILE, RUN_FILE, SETTINGS_FILE)
        return (
            any((self.path / name).exists() for name in files)
            or any((self.path / CIF_FOLDER).glob("*"))
            or bool(self.journals())
        )


def _holds(path: Path) -> bool:
    """Whether a file is there, and more than its name, which is all that a power failure may leave."""
    return path.is_file() and path.stat().st_size > 0
