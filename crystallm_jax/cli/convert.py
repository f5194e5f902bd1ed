"""`crystallm convert`: a model from any format to any other."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystallm_jax.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from crystallm_jax.models.card import ModelCard
    from crystallm_jax.models.kinds import Written

_EXAMPLE = """examples:
  crystallm convert ckpt.pt models/mine                     a published checkpoint as a model folder
  crystallm convert runs/mine mine.pt                       back, with the optimiser's moments, to train on there
  crystallm convert runs/mine models/mine --license cc-by-4.0 --data "my crystals, CC BY 4.0"
  crystallm convert default model.npz --dtype int8          for NumPy alone
  crystallm convert runs/mine models/hf --to huggingface --push me/crystals

SOURCE is a run folder, one of a run's checkpoints, a model folder, a Hugging Face folder, ckpt.pt, model.npz,
hf:OWNER/NAME, the name of a published model (`crystallm download --list`), or `default`.
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "convert",
        help="a model from any format to any other: folders, ckpt.pt, NumPy, Hugging Face",
        description="Write a model in another format. Nothing that is there already is written over.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the model, of any format (below)")
    add("target", metavar="TARGET", type=Path, help="file or folder to write, which is not there yet")
    add(
        "--to",
        choices=("folder", "published", "numpy", "huggingface"),
        help="the format (default: by TARGET's name: .pt published, .npz numpy, else folder)",
    )
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "int8"),
        default="float32",
        help="storage of the parameters (default: %(default)s; ckpt.pt holds no other, int8 is for .npz alone)",
    )
    add(
        "--storage",
        choices=("safetensors", "orbax"),
        default="safetensors",
        help="of a model folder's parameters (default: %(default)s)",
    )
    add(
        "--weights-only",
        action="store_true",
        help="leave the optimiser's moments out (default: they go along into folders and ckpt.pt)",
    )
    _add_card(parser.add_argument_group("the model card, of folders"))
    hub = parser.add_argument_group("the hub")
    hub.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder that was written to the Hugging Face hub (default: it stays here)",
    )
    hub.add_argument(
        "--private",
        action="store_true",
        help="with --push: make the repository private where it is new (default: public)",
    )
    parser.set_defaults(run=run)


def _add_card(group: Any) -> None:
    add = group.add_argument
    add("--license", metavar="ID", help="of the weights, such as cc-by-4.0 (default: as the source says)")
    add("--data", metavar="TEXT", help="what it was trained on, with credits (default: as the source says)")
    add("--command", metavar="TEXT", help="that trained it (default: as the source says)")
    add(
        "--metric",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=_metric,
        help="a measured figure; may be given several times (default: as the source says)",
    )
    add(
        "--notes",
        metavar="FILE",
        type=Path,
        help="Markdown below the head of the card (default: as the source has it, or made of the rest)",
    )


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=NUMBER")


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit code.

    Raises:
        ConfigError: flags that do not go together.
        CrystallmError: there is no such model, it is damaged, or the target cannot be written.
    """
    from crystallm_jax.models import kinds  # noqa: PLC0415 - keeps --help instant
    from crystallm_jax.models.locate import locate  # noqa: PLC0415

    target: Path = arguments.target
    kind: Written = arguments.to or kinds.kind_to_write(target)
    _check(arguments, kind)
    source = locate(arguments.source)
    model = kinds.read_to_write(source, kind=kind, weights_only=arguments.weights_only)
    card = _told(kinds.card_of(source), arguments)
    settings = kinds.WriteSettings(card, arguments.dtype, arguments.storage)
    kinds.write_model(target, model, kind=kind, settings=settings)
    sys.stdout.write(f"{target}: {_size(target) / 1e6:,.2f} MB, {kind}\n")
    if arguments.push:
        from crystallm_jax.models.hub import push_hub  # noqa: PLC0415

        url = push_hub(target, arguments.push, private=arguments.private)
        sys.stdout.write(f"{url}\n")
    return 0


def _check(arguments: argparse.Namespace, kind: "Written") -> None:
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


def _told(card: "ModelCard", arguments: argparse.Namespace) -> "ModelCard":
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
