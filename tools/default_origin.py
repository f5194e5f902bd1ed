"""What the run of the model in the package began from, kept in its folder: the card that it ends with counts it in."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from crystallm_jax.errors import ModelError
from crystallm_jax.files import new_file
from crystallm_jax.models.kinds import card_of
from crystallm_jax.models.locate import bare_name, locate
from crystallm_jax.models.runs import run_of

ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What a run began from.

    Attributes:
        init_from: a model by name or by the last part of its path, or `scratch`.
        tokens: that it had read, all its runs together, as its card says; 0 where that does not.
        data: that it had read them from, likewise.
    """

    init_from: str = "scratch"
    tokens: int = 0
    data: str = ""


def origin_of(init_from: str) -> Origin:
    """What is known of a model that a run is to begin from.

    Raises:
        CrystallmError: there is no such model, or its card cannot be read.
    """
    if init_from == "scratch":
        return Origin()
    path = locate(init_from)
    card = card_of(path)
    run = run_of(path)
    before = Origin() if run is None else read_origin(run.folder)
    data = "; ".join(filter(None, (card.data, before.data)))
    return Origin(bare_name(init_from), int(card.metrics.get("tokens", 0)) + before.tokens, data)


def write_origin(folder: Path, origin: Origin) -> None:
    """Keep it in a run folder, which is made where it is not there yet.

    Raises:
        ModelError: it cannot be written.
    """
    with new_file(folder / ORIGIN_FILE, ModelError) as partial:
        partial.write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin:
    """What a run folder says; of a run that was begun otherwise, nothing is known.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / ORIGIN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Origin(str(found["init_from"]), int(found["tokens"]), str(found["data"]))
    except FileNotFoundError:
        return Origin()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; remove it and give --tokens-before") from None
