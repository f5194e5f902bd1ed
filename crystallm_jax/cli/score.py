"""`crystallm score`: how probable given crystals are to a model."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystallm_jax.api import CrystalModel, load_model
from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, TOKENS
from crystallm_jax.data.preparing.inputs import Inputs
from crystallm_jax.data.preparing.pipeline import Dropped, Recipe, prepare_one
from crystallm_jax.data.reasons import Reasons
from crystallm_jax.data.record import Record
from crystallm_jax.errors import ModelError
from crystallm_jax.files import new_file
from crystallm_jax.sampling.scoring import score_texts

# Crystals that are prepared before they are read together.
_AT_ONCE = 256
_SHOWN = 10


class Score(NamedTuple):
    """A row of the table; a crystal without a score says why.

    Attributes:
        id: of the crystal.
        file: that it was read from.
        rank: 1 for the least perplexity.
        tokens: that count.
        log_prob: their log-probability, in nats.
        perplexity: exp(-log_prob / tokens).
        problem: why there is no score.
    """

    id: str
    file: str
    rank: int | None = None
    tokens: int | None = None
    log_prob: float | None = None
    perplexity: float | None = None
    problem: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Score and write; returns the exit code: 1 where nothing could be scored.

    Raises:
        CrystallmError: the model or an input cannot be read, or the table cannot be written.
    """
    inputs = [(path, Inputs(([path],))) for path in arguments.inputs]
    model = load_model(arguments.model, dtype=arguments.dtype)
    rows = []
    for path, found in inputs:
        stream = found.records(lambda _: None)
        while records := list(islice(stream, _AT_ONCE)):
            rows += list(_score(model, path, records, given=arguments.given))
    rows = _ranked(rows)
    out = Path(arguments.out)
    with (
        new_file(out, ModelError) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Score._fields)
        writer.writerows(rows)
    scored = [row for row in rows if row.rank is not None]
    if arguments.json:
        report = {
            "model": arguments.model,
            "given": arguments.given,
            "scores": [row._asdict() for row in rows],
        }
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(_summary(rows, scored, arguments.out))
    return 0 if scored else 1


def _score(model: CrystalModel, path: str, records: Sequence[Record], *, given: str) -> Iterator[Score]:
    """A row for each record, without its rank."""
    most = model.config.block_size + 1
    texts, problems = {}, {}
    for number, record in enumerate(records):
        outcome = prepare_one(record, Recipe())
        if isinstance(outcome, Dropped):
            problems[number] = f"{outcome.stage}: {outcome.reason}"
            continue
        tokens = np.frombuffer(outcome.payload, "<u2").astype(np.int32)
        if len(tokens) > most:
            problems[number] = f"it has {len(tokens)} tokens, the model's context takes {most}"
        else:
            texts[number] = tokens
    log_probs = dict(zip(texts, score_texts(model.config, model.params, list(texts.values())), strict=True))
    for number, record in enumerate(records):
        if number in problems:
            yield Score(record.id, path, problem=problems[number])
            continue
        counted = log_probs[number][_given_tokens(model, texts[number], given) - 1 :]
        total = float(counted.sum())
        perplexity = math.exp(-total / max(len(counted), 1))
        yield Score(record.id, path, None, len(counted), round(total, 4), round(perplexity, 6))


def _given_tokens(model: CrystalModel, tokens: Any, given: str) -> int:
    """How many tokens of a text the model is told."""
    if given == "nothing":
        return 1
    newlines = (number for number, token in enumerate(tokens) if token == model.tokenizer.newline_id)
    if given == "composition":
        return next(newlines) + 1
    group = next(number for number, token in enumerate(tokens) if TOKENS[token].endswith(SPACEGROUP_SUFFIX))
    return next(number for number in newlines if number > group) + 1


def _ranked(rows: Sequence[Score]) -> list[Score]:
    """The rows by perplexity, those without a score behind."""
    ordered = sorted(rows, key=lambda row: math.inf if row.perplexity is None else row.perplexity)
    return [
        row if row.perplexity is None else row._replace(rank=number)
        for number, row in enumerate(ordered, start=1)
    ]


def _summary(rows: Sequence[Score], scored: Sequence[Score], out: str) -> str:
    """What is printed: how many, the most probable, and why others have no score."""
    lines = [f"{len(rows)} crystals, {len(scored)} scored: {out}"]
    lines += [
        f"{row.rank:5}  perplexity {row.perplexity:8.4f}  log-probability {row.log_prob:10.3f}  {row.id}"
        for row in scored[:_SHOWN]
    ]
    reasons = Reasons()
    for row in rows:
        if row.problem:
            reasons.add("not scored", row.problem)
    lines += [f"{group.inputs:5}  {group.stage}: {group.reason}" for group in reasons.groups()]
    return "\n".join(lines) + "\n"
