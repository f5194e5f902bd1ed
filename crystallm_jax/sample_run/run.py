"""A sampling run: the device makes samples, worker processes judge them, and the folder takes both as they come."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from crystallm_jax.api import CrystalModel
from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation import ValidatorPool
from crystallm_jax.sample_run.journal import Entry
from crystallm_jax.sample_run.run_folder import ResultsFolder, file_name
from crystallm_jax.sample_run.sample_tables import Index, read_index, write_tables
from crystallm_jax.sample_run.settings import settings_of
from crystallm_jax.sample_run.summary import Session, Summary, read_summary, write_summary
from crystallm_jax.sample_run.targets import TargetOrders, ValidTarget
from crystallm_jax.sample_run.verdicts import Verdicts
from crystallm_jax.sampling.prompts import Prompt
from crystallm_jax.sampling.requests import EverySample, GenerationRequest, Orders, Wanted
from crystallm_jax.signals import StopRequest

logger = logging.getLogger(__name__)


def sample_into(
    folder: ResultsFolder,
    model: CrystalModel,
    prompts: Sequence[Prompt],
    request: GenerationRequest,
    *,
    pool: ValidatorPool,
    target: ValidTarget | None = None,
    on_batch: Callable[[int], object] | None = None,
    stop: StopRequest | None = None,
    barrier: Callable[[str], object] | None = None,
) -> Summary | None:
    """Sample, validate and write; validation runs in the pool while the device goes on.

    Memory does not grow with the samples but for a few bytes each. A run that ends early leaves CIFs, their journal
    and the tables of what is judged; one into a folder opened with `resume` makes what is missing, and leaves what an
    undisturbed one would have left.

    Args:
        folder: where to.
        model: what samples.
        prompts: with names that are unlike each other (`unique_ids`).
        request: how; a prompt's own number of samples goes before its.
        pool: validates.
        target: goes on until each prompt has so many valid samples, instead of a number of samples.
        on_batch: called with the number of samples of each batch as it is done, first of those found.
        stop: looked at after each batch and each verdict.
        barrier: waits until all parts of the run have reached the point of this name.

    Returns:
        What it came to; None in all parts but the first, which writes the tables of all.

    Raises:
        SamplingError: a request that cannot be honoured, other settings than the folder's, or a full disk.
    """
    if target is not None and request.overflow == "slide":
        raise SamplingError(
            "target_valid does not go with overflow=slide, whose samples come last; use overflow=stop"
        )
    settings = settings_of(model, prompts, request, target=target, time_limit=pool.time_limit)
    barrier = barrier or _ignore
    barrier("opened")
    if folder.begun:
        folder.check(settings)
        if folder.finished:
            return read_summary(folder) if folder.part == 0 else None
        folder.begin(settings)
    run = _Run(folder, model, prompts, request, settings=settings, target=target)
    try:
        session = run.sample(pool, on_batch or _ignore, stop or StopRequest())
    except BaseException:
        run.leave()
        raise
    finally:
        folder.close()
    barrier("sampled")
    return run.finish(session) if folder.part == 0 else None


class _Run:
    """What belongs to one run."""

    def __init__(
        self,
        folder: ResultsFolder,
        model: CrystalModel,
        prompts: Sequence[Prompt],
        request: GenerationRequest,
        *,
        settings: dict[str, Any],
        target: ValidTarget | None,
    ) -> None:
        self._folder, self._model, self._prompts, self._request = folder, model, prompts, request
        self._settings, self._target = settings, target
        self._verdicts: Verdicts | None = None

    def sample(self, pool: ValidatorPool, on_batch: Callable[[int], object], stop: StopRequest) -> Session:
        """Make, judge and write the samples of this part that are missing."""
        folder, prompts = self._folder, self._prompts
        lengths = [len(self._model.tokenizer.encode_cif(prompt.text)) for prompt in prompts]
        targets = self._targets()
        found: set[tuple[int, int]] = set()
        for entry in folder.entries(prompts):
            if self._is_mine(entry.prompt_index):
                found.add((entry.prompt_index, entry.sample_index))
                _tell(targets, entry)
        verdicts = self._verdicts = Verdicts(
            folder,
            prompts,
            settings=self._settings,
            pool=pool,
            prompt_tokens=lengths.__getitem__,
            on_verdict=lambda entry: _tell(targets, entry),
            stop=stop,
        )
        orders: Orders = (
            EverySample(self._counts(), found) if targets is None else _AsNeeded(targets, verdicts)
        )
        if found:
            on_batch(len(found))
        session = Session(found=len(found))
        started = time.perf_counter()
        for batch in self._model.generate_batches(
            [prompt.text for prompt in prompts], self._request, orders=orders
        ):
            session = session._replace(
                samples=session.samples + len(batch),
                generated_tokens=session.generated_tokens
                + sum(len(sample.token_ids) - lengths[sample.prompt_index] for sample in batch),
                sampling_seconds=round(time.perf_counter() - started, 2),
            )
            for sample in batch:
                verdicts.add(sample)
            verdicts.absorb()
            on_batch(len(batch))
            stop.check()
        verdicts.finish()
        folder.begin(self._settings)
        return session._replace(seconds=round(time.perf_counter() - started, 2))

    def leave(self) -> None:
        """After an error or an interruption: write what has its verdict, with tables of it."""
        if self._verdicts is None or not self._folder.begun:
            return
        # A second error, as of a disk that is full, would hide the first.
        with contextlib.suppress(SamplingError):
            self._verdicts.absorb()
            if self._folder.part == 0:
                journals = self._folder.journals()
                index = read_index(journals)
                write_tables(self._folder, index, self._prompts, seed=self._request.seed, journals=journals)
        logger.info("%s: what is judged is kept; the same command with --resume goes on", self._folder.path)

    def finish(self, session: Session) -> Summary:
        """Write the tables of all parts, and remove what is not kept."""
        folder, prompts, request = self._folder, self._prompts, self._request
        journals = folder.journals()
        index = read_index(journals, self._target)
        samples = zip(index.prompt.tolist(), index.sample.tolist(), strict=True)
        folder.remove_others(prompts, {file_name(prompts[prompt], sample) for prompt, sample in samples})
        totals = write_tables(folder, index, prompts, seed=request.seed, journals=journals)
        summary = Summary(totals, self._short(index), session)
        write_summary(
            folder,
            summary,
            model=self._model.name,
            parameters=self._model.num_params,
            prompts=len(prompts),
            request=asdict(request),
            target=self._target and asdict(self._target),
            validity={"symprec": 0.1, "bond_length_cutoff": 1.0, "denominator": "all samples"},
        )
        folder.remove_journals()
        return summary

    def _targets(self) -> TargetOrders | None:
        if self._target is None:
            return None
        return TargetOrders(self._target, filter(self._is_mine, range(len(self._prompts))))

    def _counts(self) -> list[int]:
        return [
            (prompt.n or self._request.num_samples) if self._is_mine(index) else 0
            for index, prompt in enumerate(self._prompts)
        ]

    def _is_mine(self, prompt_index: int) -> bool:
        return prompt_index % self._folder.parts == self._folder.part

    def _short(self, index: Index) -> tuple[str, ...]:
        if self._target is None:
            return ()
        valid = [0] * len(self._prompts)
        for prompt in index.prompt[index.valid].tolist():
            valid[prompt] += 1
        return tuple(
            prompt.id
            for prompt, count in zip(self._prompts, valid, strict=True)
            if count < self._target.valid
        )


class _AsNeeded:
    """The orders of a target, which hang on verdicts."""

    def __init__(self, targets: TargetOrders, verdicts: Verdicts) -> None:
        self._targets, self._verdicts = targets, verdicts

    def take(self, most: int) -> Sequence[Wanted]:
        """The next samples, at most so many."""
        self._verdicts.absorb()
        return self._targets.take(most)

    def wait(self) -> bool:
        """Waits for a verdict; False when none is needed any more."""
        if not self._targets.being_made or not self._verdicts.pending:
            return False
        self._verdicts.wait()
        return True


def _ignore(_: object) -> None:
    """Nobody asked."""


def _tell(targets: TargetOrders | None, entry: Entry) -> None:
    if targets is not None:
        targets.judged(entry.prompt_index, entry.sample_index, valid=entry.verdicts["valid"])
