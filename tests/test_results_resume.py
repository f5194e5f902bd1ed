"""A run that goes on after it was cut off, that goes on until enough is valid, and that several processes share."""

import csv
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation.verdict import Judgement, ValidityReport
from crystallm_jax.model import ModelConfig
from crystallm_jax.sample_run import ResultsFolder, Summary, ValidTarget, sample_into
from crystallm_jax.samples import Sample
from crystallm_jax.sampling.prompts import Prompt
from crystallm_jax.sampling.requests import GenerationRequest, Orders, Wanted

PROMPTS = [Prompt(f"p{n}", "data_\n" if n else "data_Na1Cl1\n") for n in range(4)]
REQUEST = GenerationRequest(num_samples=5, seed=3)
FRAME = '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 pbc="T T T"\nNa 0 0 0\n'


class Killed(BaseException):
    """What stands for a signal."""


def _sample(wanted: Wanted) -> Sample:
    text = f"data_{wanted.prompt_index}_{wanted.sample_index}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
    return Sample(
        prompt_index=wanted.prompt_index,
        sample_index=wanted.sample_index,
        token_ids=tuple(range(10 + number % 7)),
        text=text,
        log_prob=-(number % 50) / 8,
        finished=number % 5 > 0,
    )


def _model(rows: int = 3, *, made: list[Wanted] | None = None, **changes: Any) -> SimpleNamespace:
    """A model with so many rows, of which the last one begun ends first."""

    def generate_batches(
        prompts: Sequence[str], request: GenerationRequest, orders: Orders
    ) -> Iterator[list[Sample]]:
        running: list[Wanted] = []
        while True:
            running += orders.take(rows - len(running))
            if running:
                wanted = running.pop()
                if made is not None:
                    made.append(wanted)
                yield [_sample(wanted)]
            elif not orders.wait():
                return

    settings = {
        "name": "a stand-in",
        "num_params": 12,
        "params": {"weight": np.arange(12)},
        "config": ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=64),
        "tokenizer": CIFTokenizer(),
        "generate_batches": generate_batches,
    }
    return SimpleNamespace(**settings | changes)


def _verdict(text: str) -> Judgement:
    """A third are valid; prompt 2 has none."""
    number = hashlib.sha256(text.encode()).digest()[9]
    if number % 3 or "data_2_" in text:
        return Judgement(ValidityReport(reasons=("formula",)), FRAME if number % 2 else None)
    return Judgement(ValidityReport(valid=True), FRAME, f"symmetrised {text}")


class Pool:
    """Judges a little later, in a thread; or so many texts, where it is said, at once, and no more."""

    workers, time_limit = 1, 60.0

    def __init__(self, *, killed_after: int | None = None) -> None:
        self._left = killed_after
        self.waiting = self.most = 0

    def judge(self, text: str) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        if self._left is not None:
            if self._left == 0:
                raise Killed
            self._left -= 1
            future.set_result(_verdict(text))
            return future
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        threading.Timer(0.001, self._answer, (future, text)).start()
        return future

    def _answer(self, future: Future[Judgement], text: str) -> None:
        self.waiting -= 1
        future.set_result(_verdict(text))


def _run(path: Path, *, rows: int = 3, killed_after: int | None = None, **settings: Any) -> Summary:
    resume = settings.pop("resume", False)
    request, prompts = settings.pop("request", REQUEST), settings.pop("prompts", PROMPTS)
    model = settings.pop("model", None) or _model(rows)
    pool = Pool(killed_after=killed_after)
    summary = sample_into(ResultsFolder(path, resume=resume), model, prompts, request, pool=pool, **settings)
    assert summary is not None
    return summary


def _content(path: Path) -> dict[str, Any]:
    """All files, without what may differ between two runs that are the same."""
    found: dict[str, Any] = {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }
    found["run.json"] = json.loads(found["run.json"])
    del found["run.json"]["session"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("undisturbed")
    summary = _run(path)
    assert summary.totals.samples == 20
    return _content(path)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    journal = path / "journal-0.jsonl"
    journal.write_bytes(change(journal.read_bytes()))


def _rows(path: Path) -> list[dict[str, str]]:
    with (path / "samples.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Going on.


def test_a_run_that_is_cut_off_again_and_again_ends_with_the_same_files(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    for killed_after, rows in ((0, 3), (1, 2), (7, 5), (6, 3)):
        with pytest.raises(Killed):
            _run(tmp_path, rows=rows, killed_after=killed_after, resume=True)
    made: list[Wanted] = []
    summary = _run(tmp_path, model=_model(made=made), resume=True)
    assert summary.session.found == 20 - len(made) > 0
    assert summary.session.samples == len(made) > 0
    assert _content(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: _rewrite(path, lambda lines: lines + b'[1,2,"torn'),
        lambda path: _rewrite(path, lambda lines: lines + b"\0\0\0\n"),
        lambda path: _rewrite(path, lambda lines: lines[:-7]),
        lambda path: (path / "journal-0.jsonl").unlink(),
        lambda path: next((path / "cifs").iterdir()).unlink(),
        lambda path: next((path / "cifs").iterdir()).write_text(""),
        lambda path: next((path / "symmetrized").iterdir()).unlink(),
        lambda path: (path / "cifs" / ".p1__9.cif.0123abcd.partial").write_text("data_"),
        lambda path: (path / "samples.csv").unlink(),
    ],
)
def test_what_a_kill_tears_is_made_again(
    harm: Callable[[Path], object], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        _run(tmp_path, killed_after=12)
    harm(tmp_path)
    summary = _run(tmp_path, resume=True)
    assert summary.session.samples < 20 or summary.session.found == 0
    assert _content(tmp_path) == undisturbed


def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file can grow beyond this: the journal's sixth line or so is refused in its middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(SamplingError, match=r"journal-0\.jsonl: cannot be written: File too large"):
            _run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = (tmp_path / "journal-0.jsonl").read_bytes()
    assert 0 < len(lines) < 2000
    assert lines.endswith(b"]\n")
    assert _run(tmp_path, resume=True).session.found == lines.count(b"\n")
    assert _content(tmp_path) == undisturbed


def test_a_finished_run_has_nothing_to_do(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    first = _run(tmp_path)
    made: list[Wanted] = []
    again = _run(tmp_path, model=_model(made=made), resume=True)
    assert made == []
    assert (again.totals, again.short) == (first.totals, first.short)
    assert (again.session.found, again.session.samples) == (20, 0)
    assert _content(tmp_path) == undisturbed


def test_a_kill_between_the_tables_and_the_end_of_the_journal_is_mended(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: ResultsFolder) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "remove_journals", killed)
        with pytest.raises(Killed):
            _run(tmp_path)
    assert _run(tmp_path, resume=True).session.samples == 0
    assert _content(tmp_path) == undisturbed


def test_going_on_where_nothing_is_begins(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    _run(tmp_path / "new", resume=True)
    assert _content(tmp_path / "new") == undisturbed


def test_a_run_that_was_cut_off_is_not_begun_anew_unasked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "crystallm_jax"), pytest.raises(Killed):
        _run(tmp_path, killed_after=3)
    assert "the same command with --resume goes on" in caplog.text
    with pytest.raises(SamplingError, match="remove them; --resume goes on with them"):
        _run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request": GenerationRequest(num_samples=5, seed=4)}, "begun with seed=3, now seed=4: give what"),
        ({"request": GenerationRequest(num_samples=6, seed=3)}, "num_samples=5, now num_samples=6"),
        ({"prompts": PROMPTS[:3]}, "prompts="),
        ({"model": _model(params={"weight": np.arange(1, 13)})}, "weights="),
        ({"target": ValidTarget(1, 5)}, "target_valid=None, now target_valid=1"),
    ],
)
def test_going_on_with_other_settings_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        _run(tmp_path, killed_after=9)
    with pytest.raises(SamplingError, match=message):
        _run(tmp_path, resume=True, **changes)
    _run(tmp_path, resume=True)
    assert _content(tmp_path) == undisturbed
    with pytest.raises(SamplingError, match=message):
        _run(tmp_path, resume=True, **changes)


def test_another_batch_size_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        _run(tmp_path, killed_after=9)
    smaller = GenerationRequest(num_samples=5, seed=3, batch_size=2)
    assert _run(tmp_path, resume=True, request=smaller).totals.samples == 20


def test_samples_without_settings_cannot_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "cifs").mkdir()
    (tmp_path / "cifs" / "x__1.cif").write_text("data_x")
    with pytest.raises(SamplingError, match=r"no settings\.json"):
        ResultsFolder(tmp_path, resume=True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        _run(tmp_path, killed_after=3)
    folder = ResultsFolder(tmp_path, resume=True)
    folder.begin(json.loads((tmp_path / "settings.json").read_text()))
    with pytest.raises(SamplingError, match="another run samples into it"):
        _run(tmp_path, resume=True)
    folder.close()


# What is written, and what is kept in memory.


def test_ranks_go_by_log_probability_within_a_prompt_finished_first(tmp_path: Path) -> None:
    _run(tmp_path)
    rows = _rows(tmp_path)
    for prompt in PROMPTS:
        own = [row for row in rows if row["id"] == prompt.id]
        order = sorted(
            own, key=lambda row: (row["finished"] == "False", -float(row["log_prob"]), int(row["sample"]))
        )
        assert [row["rank"] for row in order] == ["1", "2", "3", "4", "5"]
    frames = (tmp_path / "structures.extxyz").read_text().splitlines()[1::3]
    ranks = {(row["id"], row["sample"]): row["rank"] for row in rows}
    for comment in frames:
        values = dict(word.split("=", 1) for word in comment.split() if "=" in word)
        assert values["rank"] == ranks[values["id"].strip('"'), values["sample"]]


def test_a_prompts_own_number_of_samples_goes_before_the_requests(tmp_path: Path) -> None:
    _run(tmp_path, prompts=[PROMPTS[0]._replace(n=2), PROMPTS[1]])
    assert [row["id"] for row in _rows(tmp_path)] == ["p0"] * 2 + ["p1"] * 5


def test_only_some_samples_wait_for_their_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crystallm_jax.sample_run.verdicts.AHEAD", 4)
    pool = Pool()
    folder, request = ResultsFolder(tmp_path), GenerationRequest(num_samples=20)
    summary = sample_into(folder, _model(), PROMPTS, request, pool=pool)
    assert summary is not None
    assert summary.totals.samples == 80
    assert pool.most <= 4


# Until enough is valid.


def _until(path: Path, target: ValidTarget, **settings: Any) -> dict[str, Any]:
    _run(path, target=target, **settings)
    return _content(path)


def test_a_target_keeps_what_comes_up_to_the_last_one_that_is_wanted(tmp_path: Path) -> None:
    target = ValidTarget(2, 30)
    summary = _run(tmp_path, target=target)
    rows = _rows(tmp_path)
    for prompt in PROMPTS:
        own = [row for row in rows if row["id"] == prompt.id]
        valid = [row["valid"] == "True" for row in own]
        assert [row["sample"] for row in own] == [str(n) for n in range(1, len(own) + 1)]
        if prompt.id == "p2":
            assert len(own) == 30
        else:
            assert sum(valid) == 2
            assert valid[-1]
    assert summary.short == ("p2",)
    names = {Path(row["file"]).name for row in rows}
    assert {path.name for path in (tmp_path / "cifs").iterdir()} == names
    assert {path.name for path in (tmp_path / "symmetrized").iterdir()} <= names
    assert summary.totals.samples == len(rows) <= summary.session.samples


def test_what_a_target_keeps_depends_neither_on_rows_nor_on_interruptions(tmp_path: Path) -> None:
    target = ValidTarget(3, 25)
    expected = _until(tmp_path / "one", target, rows=1)
    assert _until(tmp_path / "many", target, rows=40) == expected
    for killed_after in (4, 11, 13):
        with pytest.raises(Killed):
            _run(tmp_path / "cut", target=target, rows=7, killed_after=killed_after, resume=True)
    assert _until(tmp_path / "cut", target, rows=3, resume=True) == expected


def test_a_target_makes_few_samples_that_are_not_kept(tmp_path: Path) -> None:
    made: list[Wanted] = []
    summary = _run(tmp_path, target=ValidTarget(4, 100), model=_model(4, made=made), prompts=PROMPTS[:2])
    assert len(made) == len(set(made))
    assert len(made) <= summary.totals.samples + 30


def test_a_target_is_refused_where_samples_come_last(tmp_path: Path) -> None:
    request = GenerationRequest(overflow="slide")
    with pytest.raises(SamplingError, match="does not go with overflow=slide"):
        _run(tmp_path, target=ValidTarget(1, 5), request=request)


@pytest.mark.parametrize(("valid", "limit", "message"), [(0, 5, "at least 1"), (3, 2, "fewer than")])
def test_targets_that_cannot_be_reached_are_refused(valid: int, limit: int, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        ValidTarget(valid, limit)


# Several processes.


@pytest.mark.parametrize("target", [None, ValidTarget(2, 12)])
def test_parts_make_their_own_prompts_and_the_first_merges(
    tmp_path: Path, target: ValidTarget | None
) -> None:
    alone = tmp_path / "alone"
    _run(alone, target=target)
    shared = tmp_path / "shared"
    folders = [ResultsFolder(shared, part=part, parts=2) for part in range(2)]
    barrier = threading.Barrier(2, timeout=60)
    results: list[Any] = [None, None]
    made: list[list[Wanted]] = [[], []]

    def work(part: int) -> None:
        results[part] = sample_into(
            folders[part],
            _model(made=made[part]),
            PROMPTS,
            REQUEST,
            pool=Pool(),
            target=target,
            barrier=lambda name: barrier.wait(),
        )

    threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [{wanted.prompt_index % 2 for wanted in part} for part in made] == [{0}, {1}]
    assert results[1] is None
    assert results[0].totals.samples == len(_rows(alone))
    assert _content(shared) == _content(alone)


def test_one_process_goes_on_with_what_two_left(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    folders = [ResultsFolder(tmp_path, part=part, parts=2) for part in range(2)]
    for folder in folders[::-1]:
        with pytest.raises(Killed):
            sample_into(folder, _model(), PROMPTS, REQUEST, pool=Pool(killed_after=6))
    assert len(list(tmp_path.glob("journal-*"))) == 2
    summary = _run(tmp_path, resume=True)
    assert summary.session.found > 0
    assert _content(tmp_path) == undisturbed
