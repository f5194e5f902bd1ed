"""A decay that is branched off the run of the model in the package: which checkpoint it begins from, and its end."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from crystallm_jax.errors import ModelError
from crystallm_jax.files import new_file
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, is_checkpoint

BRANCH_FILE = "branch.json"
# Of the steps before the decay, how many it takes; and how many at least.
_SHARE, _FEWEST = 10, 200


@dataclass(frozen=True)
class Branch:
    """A decay.

    Attributes:
        folder: of the decay, a run folder.
        run: that it is branched off.
        step: of the checkpoint that it begins from.
        decay_iters: how many steps it takes.
        outcome: what came of it; empty before its end.
    """

    folder: Path
    run: Path
    step: int
    decay_iters: int
    outcome: str = ""

    @property
    def last_step(self) -> int:
        """At which it ends."""
        return self.step + self.decay_iters


def find_branch(run: Path, folder: Path | None, decay_iters: int | None) -> Branch:
    """The decay to go on with, or a new one from the run's newest checkpoint.

    Args:
        run: the run folder.
        folder: of the decay; None takes the newest that is not at its end, else `decay_STEP` beside the run.
        decay_iters: steps of a new one; None takes a tenth of those before it, at least 200.

    Raises:
        ModelError: the run has no checkpoint, or the folder holds something else.
    """
    steps = _checkpoints(run)
    if not steps:
        raise ModelError(f"{run}: has no checkpoint to branch off: train it first (tools/train_default.py)")
    step = max(steps)
    if folder is None:
        unfinished = [branch for branch in _branches(run) if not branch.outcome and _goes_on(branch, steps)]
        found = max(unfinished, key=lambda branch: branch.step, default=None)
        folder = run.parent / f"decay_{step}" if found is None else found.folder
    if (folder / BRANCH_FILE).is_file():
        branch = read_branch(folder)
        _check(branch, run, decay_iters)
        if _goes_on(branch, steps):
            return branch
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder}: holds no decay of {run}: give another --out-dir")
    return Branch(folder, run, step, decay_iters or max(_FEWEST, step // _SHARE))


def write_branch(branch: Branch, outcome: str = "") -> None:
    """Keep what a decay is in its folder.

    Raises:
        ModelError: it cannot be written.
    """
    values = asdict(replace(branch, outcome=outcome))
    with (
        new_file(branch.folder / BRANCH_FILE, ModelError) as partial,
    ):
        partial.write_text(
            json.dumps({**values, "folder": str(branch.folder), "run": str(branch.run)}) + "\n"
        )


def read_branch(folder: Path) -> Branch:
    """What a folder says of the decay in it.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / BRANCH_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Branch(
            folder, Path(found["run"]), int(found["step"]), int(found["decay_iters"]), str(found["outcome"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; give another --out-dir") from None


def _branches(run: Path) -> Iterator[Branch]:
    for path in run.parent.glob(f"decay_*/{BRANCH_FILE}"):
        branch = read_branch(path.parent)
        if branch.run.resolve() == run.resolve():
            yield branch


def _goes_on(branch: Branch, steps: list[int]) -> bool:
    """Whether it has a checkpoint of its own, or that which it begins from is still there: the run keeps few."""
    return bool(_checkpoints(branch.folder)) or branch.step in steps


def _check(branch: Branch, run: Path, decay_iters: int | None) -> None:
    if branch.run.resolve() != run.resolve():
        raise ModelError(f"{branch.folder}: a decay of {branch.run}, not of {run}: give another --out-dir")
    if decay_iters not in (None, branch.decay_iters):
        raise ModelError(
            f"{branch.folder}: a decay of {branch.decay_iters} steps, not of --decay-iters {decay_iters}: leave that"
            " out, or give another --out-dir"
        )


def _checkpoints(run: Path) -> list[int]:
    folder = run / CHECKPOINTS_FOLDER
    return [int(path.name) for path in folder.iterdir() if is_checkpoint(path)] if folder.is_dir() else []
