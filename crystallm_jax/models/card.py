"""Model cards: what a model was made of and how, for people, with a head that programs read.

A card is Markdown behind a head of YAML between two lines `---`, as model hubs have it. The head names the size and
SHA-256 of every file of the folder, so that a model that has travelled can be compared with the one that left.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from crystallm_jax.config import load_plain_yaml
from crystallm_jax.errors import ModelError
from crystallm_jax.files import digest_of

CARD_FILE = "MODEL_CARD.md"
LIBRARY = "crystallm_jax"
# Of the folder: 1 had no head, no vocabulary and no hashes.
FOLDER_FORMAT = 2
_FENCE = "---\n"
_LONGEST = 1 << 20


@dataclass(frozen=True)
class FileHash:
    """What a file was when it was written: its size and the SHA-256 of its bytes in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelCard:
    """What is to be known of a model.

    Attributes:
        license: of the weights, as an SPDX identifier, such as `cc-by-4.0`; empty where it is not stated.
        data: what it was trained on, with licence and credits.
        training_command: which made it.
        metrics: measured figures by name, such as `val_loss` in nats a token.
        parameters: how many, the tied head counted once.
        format: of the folder.
        files: by name in the folder, all but the card.
        text: Markdown for people, behind the head; empty to have one made of the rest.
    """

    license: str = ""
    data: str = ""
    training_command: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int = 0
    format: int = FOLDER_FORMAT
    files: Mapping[str, FileHash] = field(default_factory=dict)
    text: str = ""

    def to_markdown(self) -> str:
        """The card as it is written."""
        head: dict[str, Any] = {"library_name": LIBRARY, "tags": ["crystal-structure", "cif", "jax"]}
        head |= {key: value for key, value in asdict(self).items() if key != "text" and value}
        text = self.text or self._made_text()
        return f"{_FENCE}{yaml.safe_dump(head, sort_keys=False, width=110)}{_FENCE}\n{text.strip()}\n"

    def _made_text(self) -> str:
        parts = ["# Model card", "A language model of crystal structures in CIF text."]
        known = [
            ("Parameters", f"{self.parameters:,}" if self.parameters else ""),
            ("Data", self.data),
            ("Licence", self.license),
            ("Metrics", ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())),
        ]
        parts.append("\n".join(f"- {name}: {value or 'not stated'}" for name, value in known))
        if self.training_command:
            parts.append(f"Made by\n\n    {self.training_command}")
        return "\n\n".join(parts)


def read_card(folder: Path) -> ModelCard:
    """The card of a model folder; of one that has none, or one without a head, what there is.

    Raises:
        ModelError: its head is damaged.
    """
    path = folder / CARD_FILE
    if path.exists() and not path.is_file():  # such as a pipe, which would be waited for
        raise ModelError(f"{path}: cannot be read: no plain file")
    try:
        with path.open("rb") as file:
            # Git and editors may have made its line ends those of another system.
            text = file.read(_LONGEST).decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        return ModelCard(format=1)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not text.startswith(_FENCE):
        return ModelCard(format=1, text=text)
    head, fence, rest = text.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    try:
        if not fence:
            raise ValueError("it has no end")
        return _card(load_plain_yaml(head), rest.strip())
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: the head of the card is damaged: {reason}") from None


def _card(head: Mapping[str, Any], text: str) -> ModelCard:
    files = {
        str(name): FileHash(int(entry["bytes"]), str(entry["sha256"]))
        for name, entry in (head.get("files") or {}).items()
    }
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names {name!r}, which is not in the folder")
    return ModelCard(
        license=str(head.get("license") or ""),
        data=str(head.get("data") or ""),
        training_command=str(head.get("training_command") or ""),
        metrics={str(name): float(value) for name, value in (head.get("metrics") or {}).items()},
        parameters=int(head.get("parameters") or 0),
        format=int(head.get("format") or FOLDER_FORMAT),
        files=files,
        text=text,
    )


def with_hashes(card: ModelCard, folder: Path) -> ModelCard:
    """The card with the hashes of all files that are in the folder, itself left out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return replace(
        card,
        files={name: hash_of(folder / name) for name in names if name != CARD_FILE},
        format=FOLDER_FORMAT,
    )


def hash_of(path: Path) -> FileHash:
    """Size and SHA-256 of a file."""
    return FileHash(path.stat().st_size, digest_of(path))


def damage_of(folder: Path, card: ModelCard, name: str) -> str | None:
    """What is wrong with a file that the card names; None where nothing is, or where the card does not name it.

    Raises:
        ModelError: it cannot be read.
    """
    expected = card.files.get(name)
    if expected is None:
        return None
    try:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != expected.bytes:
            return f"{name} has {size:,} bytes, the card says {expected.bytes:,}"
        found = hash_of(folder / name).sha256
    except OSError as error:
        raise ModelError(f"{folder / name}: cannot be read: {error.strerror}") from None
    return (
        None
        if found == expected.sha256
        else f"{name} is not the file that the card was written for (SHA-256 {found[:12]}…)"
    )
