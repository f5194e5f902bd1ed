"""Feeds broken CIF texts to everything that reads them: `python tools/fuzz_cif.py --count 20000 --out finds`.

Nothing but `CIFError`, in one line, may come out; no text may take longer than the time limit, kill its
process or need over 2 GiB. Each find is written with what came out of it, the shortest of each kind cut down
first. Text N of a seed is the same in every run, whatever the number of workers.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cif_mutations import mutated
from pebble import ProcessExpired, ProcessPool

from crystallm_jax.cif import (
    CIFTokenizer,
    postprocess_cif,
    preprocess_cif,
    prompt_from_cif,
    stream_text,
    symmetrized_cif,
)
from crystallm_jax.data import read_records
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.reading import structures as reader
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import validate
from crystallm_jax.processes import SPAWN

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
CORPUS_STEP = 25
MEMORY = 2 * 1024**3
LONGEST_MESSAGE = 600
_PATIENCE = 1.0  # seconds, after which `validate` should end by itself
_SLACK = 10  # a busy machine gives a process a part of its time
AHEAD = 8
TOKENIZER = CIFTokenizer()
_DIGITS = re.compile(r"\d+")


class Find(NamedTuple):
    """What a text did that it must not: the function, the kind of thing, and the thing itself."""

    target: str
    kind: str
    what: str


def seed_texts(extra: Iterable[str] = ()) -> list[str]:
    """The CIF fixtures, some crystals of the embedded corpus in each form of the dialect, and a user's own."""
    fixtures = sorted(
        p for p in FIXTURES.rglob("*") if p.suffix in {".cif", ".txt"} and p.parent.name != "fuzz"
    )
    texts = [path.read_text(encoding="utf-8") for path in fixtures]
    for number, record in enumerate(read_corpus()):
        if number % CORPUS_STEP == 0:
            texts.append(record.text)
        if number % (CORPUS_STEP * 8) == 0:
            preprocessed = preprocess_cif(record.text)
            texts += [preprocessed, stream_text(preprocessed)]
    for name in extra:
        texts += [record.text for record in read_records(name) if record.problem is None]
    return texts


def check(text: str, *, patience: float = _PATIENCE) -> list[Find]:
    """Run everything that reads texts on this one; an empty list is as it should be."""
    finds: list[Find] = []

    def attempt(target: str, function: Callable[[], object]) -> object:
        try:
            return function()
        except CIFError as error:
            message = str(error)
            if len(message.splitlines()) != 1 or len(message) > LONGEST_MESSAGE:
                finds.append(Find(target, "message", f"{len(message)} characters: {message[:2000]}"))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            finds.append(Find(target, type(error).__name__, traceback.format_exc(limit=-6)))
        return None

    attempt("encode_cif", lambda: _same_tokens(text))
    attempt("stream_text", lambda: stream_text(text))
    attempt("postprocess_cif", lambda: postprocess_cif(text))
    attempt("prompt_from_cif", lambda: prompt_from_cif(text))
    attempt("prompt_from_cif", lambda: prompt_from_cif(text, with_spacegroup=True))
    attempt("preprocess_cif", lambda: _same_tokens(stream_text(preprocess_cif(text))))
    structure = attempt("parse_structure", lambda: reader.parse_structure(text))
    if structure is not None:
        written = attempt("symmetrized_cif", lambda: symmetrized_cif(structure))
        if written is not None:
            attempt("written", lambda: stream_text(preprocess_cif(written)))
        attempt("plain", lambda: _same_structure(text))
    report = attempt("validate", lambda: validate(text, time_limit=patience))
    if report is not None and "memory" in report.reasons:
        finds.append(Find("validate", "MemoryError", str(report.error)))
    return finds


def _same_tokens(text: str) -> None:
    if TOKENIZER.encode_cif(text).tolist() != TOKENIZER.encode(TOKENIZER.tokenize_cif(text)):
        raise AssertionError("encode_cif differs from encode(tokenize_cif)")


def _same_structure(text: str) -> None:
    """Where the strict reader of plain texts gives a structure, pymatgen must give the same."""
    cell = reader.read_plain_cell(text)
    ours = None if cell is None else reader._build(cell)
    if ours is None:
        return
    try:
        theirs = reader._parse_with_pymatgen(text)
    except CIFError as error:
        raise AssertionError(f"read as {ours.composition}, refused by pymatgen: {error}") from error
    same = np.array_equal(ours.lattice.matrix, theirs.lattice.matrix) and np.array_equal(
        ours.frac_coords, theirs.frac_coords
    )
    if not same or ours.species != theirs.species:
        raise AssertionError(f"read as {ours.composition}, by pymatgen as {theirs.composition}, or elsewhere")


def cut_down(text: str, wanted: Find, *, seconds: float = 60.0) -> str:
    """A shorter text with the same find, by leaving out lines and then characters, in bounded time."""
    end = time.monotonic() + seconds

    def still(candidate: str) -> bool:
        return any(find[:2] == wanted[:2] for find in check(candidate))

    for separator in ("\n", ""):
        parts = text.split(separator) if separator else list(text)
        size = max(len(parts) // 2, 1)
        while True:
            place = 0
            while place < len(parts) and time.monotonic() < end:
                shorter = parts[:place] + parts[place + size :]
                if shorter and still(separator.join(shorter)):
                    parts = shorter
                else:
                    place += size
            if size == 1 or time.monotonic() > end:
                break
            size //= 2
        text = separator.join(parts)
    return text


def campaign(
    seeds: list[str], seed: int, numbers: Iterable[int], *, workers: int, time_limit: float
) -> Iterator[tuple[int, str, list[Find]]]:
    """Yield (number, text, finds) of each text, in order."""
    with ProcessPool(workers, initializer=_limit, context=SPAWN) as pool:
        pending: deque[tuple[int, str, Future[list[Find]]]] = deque()
        for number in numbers:
            text = mutated(seeds, seed, number)
            pending.append(
                (
                    number,
                    text,
                    pool.schedule(timed_check, args=[text, time_limit], timeout=_SLACK * time_limit),
                )
            )
            if len(pending) >= AHEAD * workers:
                yield _settled(*pending.popleft())
        while pending:
            yield _settled(*pending.popleft())


def timed_check(text: str, seconds: float) -> list[Find]:
    """`check` in at most some seconds of processor time; then the process is ended, whatever it is in."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return check(text)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _settled(number: int, text: str, future: "Future[list[Find]]") -> tuple[int, str, list[Find]]:
    return number, text, _outcome(future)


def _outcome(future: "Future[list[Find]]") -> list[Find]:
    try:
        return future.result()
    except TimeoutError:
        return [Find("process", "timeout", "the time limit ran out")]
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGPROF:
            return [Find("process", "timeout", "the time limit ran out")]
        return [Find("process", "died", f"exit code {error.exitcode}")]


def _limit() -> None:
    """Keep a worker quiet, to one thread, and within its memory, on Linux."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    check("data_x\n")
    try:
        import resource  # noqa: PLC0415 - POSIX only

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        return
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    """Run a campaign; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Feed broken CIF texts to everything that reads them.")
    parser.add_argument("--count", type=int, default=20_000, help="texts (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=20.0,
        metavar="S",
        help="processor seconds a text (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", nargs="*", default=[], metavar="INPUT", help="folders or CSVs of more CIFs"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the finds")
    parser.add_argument("--cut-down", action="store_true", help="shorten the first find of each kind")
    arguments = parser.parse_args()
    seeds = seed_texts(arguments.seeds)
    numbers = range(arguments.first, arguments.first + arguments.count)
    kinds: Counter[str] = Counter()
    shortest: dict[str, tuple[str, Find]] = {}
    begin = time.monotonic()
    results = campaign(
        seeds, arguments.seed, numbers, workers=arguments.workers, time_limit=arguments.time_limit
    )
    for done, (number, text, finds) in enumerate(results, start=1):
        for find in finds:
            kind = _kind(find)
            kinds[kind] += 1
            if kind not in shortest or len(text) < len(shortest[kind][0]):
                shortest[kind] = (text, find)
            if arguments.out is not None and kinds[kind] <= 5:
                _write(arguments.out, f"{arguments.seed}-{number}-{find.target}", text, find)
        if done % 1000 == 0:
            print(
                f"{done:,} texts, {sum(kinds.values()):,} finds, {time.monotonic() - begin:.0f} s",
                file=sys.stderr,
            )
    if arguments.cut_down and arguments.out is not None:
        for n, (text, find) in enumerate(shortest.values()):
            if find.target != "process":
                _write(arguments.out, f"short-{n}-{find.target}-{find.kind}", cut_down(text, find), find)
    seconds = time.monotonic() - begin
    print(
        f"{arguments.count:,} texts from {len(seeds)} seeds in {seconds:.0f} s, {sum(kinds.values()):,} finds"
    )
    for kind, count in kinds.most_common():
        print(f"{count:8,}  {kind}")
    return int(bool(kinds))


def _kind(find: Find) -> str:
    """The find without what changes from text to text: its target, class and last place."""
    place = [line.strip() for line in find.what.splitlines() if line.strip().startswith("File ")][-1:]
    return " | ".join([find.target, find.kind, *(re.sub(r".*/site-packages/", "", p) for p in place)])


def _write(folder: Path, name: str, text: str, find: Find) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.cif").write_bytes(text.encode())
    (folder / f"{name}.json").write_text(json.dumps(find._asdict(), indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
