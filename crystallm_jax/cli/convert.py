"""`crystallm convert`: a model from any format to any other."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.hub import push_hub
from crystallm_jax.models.kinds import (
    WriteSettings,
    Written,
    card_of,
    kind_to_write,
    read_to_write,
    write_model,
)
from crystallm_jax.models.locate import locate


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit code.

    Raises:
        ConfigError: flags that do not go together.
        CrystallmError: there is no such model, it is damaged, or the target cannot be written.
    """
    target: Path = arguments.target
    kind: Written = arguments.to or kind_to_write(target)
    _check(arguments, kind)
    source = locate(arguments.source)
    model = read_to_write(source, kind=kind, weights_only=arguments.weights_only)
    settings = WriteSettings(_told(card_of(source), arguments), arguments.dtype, arguments.storage)
    write_model(target, model, kind=kind, settings=settings)
    sys.stdout.write(f"{target}: {_size(target) / 1e6:,.2f} MB, {kind}\n")
    if arguments.push:
        url = push_hub(target, arguments.push, private=arguments.private)
        sys.stdout.write(f"{url}\n")
    return 0


def _check(arguments: argparse.Namespace, kind: Written) -> None:
    """Refuse what the format has no place for, rather than to leave it out."""
    place = f"{arguments.target}, {kind}"
    if kind not in ("folder", "huggingface"):
        if arguments.push:
            raise ConfigError(
                f"--push {arguments.push}: only folders are uploaded, not {place}: add --to huggingface"
            )
        told = {f"--{name}": getattr(arguments, name) for name in ("license", "data", "command", "notes")}
        flag = next(
            (flag for flag, value in {**told, "--metric": arguments.metric or None}.items() if value), None
        )
        if flag is not None:
            raise ConfigError(f"{flag}: there is no model card in {place}: leave it out, or write a folder")
    if arguments.private and not arguments.push:
        raise ConfigError("--private says how --push makes a repository: add --push OWNER/NAME")
    if arguments.storage != "safetensors" and kind != "folder":
        raise ConfigError(f"--storage {arguments.storage}: of model folders alone, not of {place}")
    if arguments.dtype == "int8" and kind != "numpy":
        raise ConfigError(f"--dtype int8: of NumPy files (.npz) alone, not of {place}")
    if arguments.dtype != "float32" and kind == "published":
        raise ConfigError(
            f"--dtype {arguments.dtype}: published checkpoints hold float32 alone: leave it out"
        )


def _told(card: ModelCard, arguments: argparse.Namespace) -> ModelCard:
    """The card with what the command line says."""
    told = {
        "license": arguments.license,
        "data": arguments.data,
        "training_command": arguments.command,
        "metrics": {**card.metrics, **dict(arguments.metric)},
    }
    if arguments.notes is not None:
        try:
            told["text"] = arguments.notes.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"--notes {arguments.notes}: cannot be read: {error}") from None
    return replace(card, **{key: value for key, value in told.items() if value is not None})


def _size(target: Path) -> int:
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)
