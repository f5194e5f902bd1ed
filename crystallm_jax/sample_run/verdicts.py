"""Samples on their way through the validators into the folder, only some at a time."""

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from crystallm_jax.evaluation import Judgement, ValidatorPool
from crystallm_jax.sample_run.journal import Entry, entry_of, judged_entry
from crystallm_jax.sample_run.run_folder import CIF_FOLDER, SYMMETRIZED_FOLDER, ResultsFolder, file_name
from crystallm_jax.samples import Sample
from crystallm_jax.sampling.prompts import Prompt
from crystallm_jax.signals import StopRequest

# Samples waiting for each worker, beyond which no further ones are taken.
AHEAD = 64
_LOOK_SECONDS = 1.0


class Verdicts:
    """Sends samples to the validators, and writes what comes back into the folder.

    A CIF is written when its sample comes, the symmetrised one and the line in the journal when its verdict does;
    then nothing of the sample stays in memory.

    Args:
        folder: begun with the first sample, so that a run that makes none leaves it free.
        prompts: all.
        settings: of the run.
        pool: validates.
        prompt_tokens: gives the tokens of a prompt, by its index.
        on_verdict: told of each entry.
        stop: looked at while waiting.
    """

    def __init__(
        self,
        folder: ResultsFolder,
        prompts: Sequence[Prompt],
        *,
        settings: Mapping[str, Any],
        pool: ValidatorPool,
        prompt_tokens: Callable[[int], int],
        on_verdict: Callable[[Entry], object],
        stop: StopRequest,
    ) -> None:
        self._folder, self._prompts, self._settings, self._pool = folder, prompts, settings, pool
        self._prompt_tokens, self._on_verdict, self._stop = prompt_tokens, on_verdict, stop
        self._done: queue.SimpleQueue[tuple[Entry, Future[Judgement]]] = queue.SimpleQueue()
        self.pending = 0
        """Samples without a verdict."""

    def add(self, sample: Sample) -> None:
        """Take a sample, once there is room for it.

        Raises:
            SamplingError: the disk takes no more.
        """
        while self.pending >= AHEAD * self._pool.workers:
            self.wait()
        self._folder.begin(self._settings)
        text = sample.cif
        name = file_name(self._prompts[sample.prompt_index], sample.sample_index)
        self._folder.write(f"{CIF_FOLDER}/{name}", text)
        entry = entry_of(sample, prompt_tokens=self._prompt_tokens(sample.prompt_index))
        self.pending += 1
        self._pool.judge(text).add_done_callback(lambda done: self._done.put((entry, done)))

    def absorb(self) -> None:
        """Write what has its verdict.

        Raises:
            SamplingError: the disk takes no more.
        """
        while not self._done.empty():
            self._write(*self._done.get())

    def wait(self) -> None:
        """Wait until a sample has its verdict, and write what has.

        Raises:
            SamplingError: the disk takes no more.
        """
        while self.pending:
            self._stop.check()
            try:
                self._write(*self._done.get(timeout=_LOOK_SECONDS))
            except queue.Empty:
                continue
            self.absorb()
            return

    def finish(self) -> None:
        """Wait for all verdicts.

        Raises:
            SamplingError: the disk takes no more.
        """
        while self.pending:
            self.wait()

    def _write(self, entry: Entry, done: Future[Judgement]) -> None:
        self.pending -= 1
        judgement = done.result()
        judged = judged_entry(entry, judgement)
        name = file_name(self._prompts[entry.prompt_index], entry.sample_index)
        if judgement.symmetrized is not None:
            self._folder.write(f"{SYMMETRIZED_FOLDER}/{name}", judgement.symmetrized)
        self._folder.append(judged)
        self._on_verdict(judged)
