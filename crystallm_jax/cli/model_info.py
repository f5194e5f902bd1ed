"""`crystallm info` of a model: its shape, its card, and whether its files are those that the card was written for."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from crystallm_jax.errors import ConfigError
from crystallm_jax.models.description import ModelDescription, describe_model

_HEAD = 13
_WIDTH = 100
_SHOWN_DIGITS = 16


def show(arguments: argparse.Namespace, path: Path) -> int:
    """Describe a model; returns 1 if anything is wrong with it.

    Raises:
        ConfigError: a picture is wanted.
    """
    if arguments.plot is not None:
        raise ConfigError(
            f"--plot {arguments.plot}: of a model nothing is drawn here: see `crystallm embeddings`"
        )
    found = describe_model(path, verify=not arguments.no_verify)
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(report(found))
    return 1 if found.problems else 0


def report(found: ModelDescription) -> str:
    """The description as text."""
    sections = [
        [f"{found.path}: {found.kind}" + (f", {found.parameters:,} parameters" if found.parameters else "")],
        list(_model(found)),
        list(_card(found)),
        list(_files(found)),
        textwrap.dedent(found.text).strip().splitlines(),
        list(_verdict(found)),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
    # A card may come from anywhere: what would steer the terminal is shown as a question mark.
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)


def _model(found: ModelDescription) -> Iterator[str]:
    get = found.config.get
    if found.config:
        yield _row(
            "model",
            f"{get('n_layer')} layers, {get('n_head')} heads, width {get('n_embd')}, context {get('block_size')},"
            f" {get('vocab_size')} tokens, {'biases' if get('bias') else 'no biases'}",
        )
    if found.step is not None:
        best = "" if found.best_val_loss is None else f", best validation loss {found.best_val_loss:.4g}"
        moments = ", with the optimiser's moments" if found.keeps_moments else ""
        yield _row("training", f"step {found.step:,}{best}{moments}")


def _card(found: ModelDescription) -> Iterator[str]:
    for head, text in (
        ("licence", found.license),
        ("data", found.data),
        ("metrics", ", ".join(f"{name} {value:.6g}" for name, value in found.metrics.items())),
        ("command", found.training_command),
    ):
        if text:
            yield from _wrapped(head, text)


def _files(found: ModelDescription) -> Iterator[str]:
    for i, (name, entry) in enumerate(found.files.items()):
        head = "files" if i == 0 else ""
        yield _row(
            head, f"{name:<22} {entry['bytes']:>14,} bytes  SHA-256 {entry['sha256'][:_SHOWN_DIGITS]}…"
        )


def _verdict(found: ModelDescription) -> Iterator[str]:
    if found.problems:
        yield "wrong:"
        yield from (f"  {problem}" for problem in found.problems)
    elif found.checked:
        yield "verified: every file is the one that the card was written for, every tensor has its name and shape"
    else:
        yield "every tensor has its name and shape; there are no hashes to compare"


def _row(head: str, text: str) -> str:
    return f"{head:<{_HEAD}}{text}"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{head:<{_HEAD}}",
        subsequent_indent=" " * _HEAD,
        break_long_words=False,
        break_on_hyphens=False,
    )
