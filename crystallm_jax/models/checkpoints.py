"""The checkpoints of a run as they lie on disk, read to the host.

One whose files have changed since they were written is passed over for the one before.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from crystallm_jax.errors import ModelError
from crystallm_jax.train_run.checksums import UNREADABLE, find_damage
from crystallm_jax.train_run.names import saved_steps

STATE, DESCRIPTION = "state", "description"
"""Parts of a checkpoint: a folder each."""
# Where orbax keeps what is saved as JSON, in a folder named as the part.
_JSON_FILE = "metadata"
_LONGEST_REASON = 500

logger = logging.getLogger(__name__)
Read = TypeVar("Read")


class SavedArrays(NamedTuple):
    """Some of a checkpoint's arrays on the host, in nested dicts named as the fields of the training state."""

    step: int
    arrays: dict[str, Any]
    description: dict[str, Any]


class SavedCheckpoints:
    """The checkpoints of one run folder; remembers which it found damaged.

    Args:
        folder: where they are kept, one subfolder a step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.damage: dict[int, str | None] = {}

    def steps(self) -> list[int]:
        """Steps of the complete ones, the newest first."""
        return sorted(saved_steps(self.folder), reverse=True)

    def describe(self, step: int | None = None) -> dict[str, Any]:
        """The description of a checkpoint (the newest intact one by default), without its arrays.

        Raises:
            ModelError: there is none, or the one asked for is damaged.
        """
        return self.intact(self.description, step)

    def read(self, wanted: Callable[[tuple[str, ...]], bool], step: int | None = None) -> SavedArrays:
        """Read some arrays of a checkpoint (the newest intact one by default) to the host, whatever their layout.

        Args:
            wanted: of the path of an array, such as `("params", "wte", "embedding")`.
            step: of the checkpoint.

        Raises:
            ModelError: there is none, or the one asked for is damaged.
        """
        from crystallm_jax.models.orbax_arrays import read_arrays  # noqa: PLC0415  orbax, for runs alone

        def found(candidate: int) -> SavedArrays:
            arrays = read_arrays(self.folder / str(candidate) / STATE, wanted)
            return SavedArrays(candidate, arrays, self.description(candidate))

        return self.intact(found, step)

    def description(self, step: int) -> dict[str, Any]:
        """The description of one checkpoint, whether it is intact or not."""
        return dict(json.loads((self.folder / str(step) / DESCRIPTION / _JSON_FILE).read_bytes()))

    def intact(self, read: Callable[[int], Read], step: int | None) -> Read:
        """What `read` makes of a checkpoint, or of the newest one that is intact; says which were passed over.

        Raises:
            ModelError: there is none, or the one asked for is damaged.
        """
        steps = self._existing(step)
        told = len([found for found in self.damage.values() if found])
        for candidate in steps:
            try:
                if (damage := self.find_damage(candidate)) is None:
                    result = read(candidate)
                    break
            except Exception as error:
                if not _tells_of_damage(error):
                    raise
                damage = self.damage[candidate] = f"cannot be restored: {first_line(error)}"
        else:
            damage = self.damage[steps[0]]
            raise ModelError(
                f"{self.folder / str(steps[0])}: damaged: {damage}; "
                + (
                    "no other is intact either: begin anew in another out_dir"
                    if step is None
                    else "take another"
                )
            )
        passed = {number: found for number, found in self.damage.items() if found and number > candidate}
        if step is None and len(passed) > told:
            what = "; ".join(f"step {number}: {found}" for number, found in passed.items())
            logger.warning("%s: damaged (%s): step %d is taken", self.folder, what, candidate)
        return result

    def find_damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; looked for once."""
        if step not in self.damage:
            self.damage[step] = find_damage(self.folder / str(step))
        return self.damage[step]

    def _existing(self, step: int | None) -> list[int]:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            raise ModelError(f"{self.folder}: no complete checkpoint{wanted}; start with init_from=scratch")
        return steps if step is None else [step]


def first_line(error: BaseException) -> str:
    """What went wrong, without the description of the store that tensorstore appends."""
    line = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
    for description in (" [tensorstore_spec", " See full TensorStore"):
        line = line.split(description, 1)[0]
    return line[:_LONGEST_REASON]


def _tells_of_damage(error: Exception) -> bool:
    """Whether a read failed for what is on disk; what the store finds amiss comes as a plain Exception."""
    unreadable = isinstance(error, UNREADABLE) or type(error) is Exception
    return unreadable and not isinstance(error, ModelError)
