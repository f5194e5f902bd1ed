"""Checkpoints of a run.

A checkpoint holds the training state, the data iterator's state and a description (configuration, validation loss,
versions). It appears under its final name when it is complete: a kill or a full disk in the middle of writing
leaves the one before as the newest. Its files are summed up once they are there; one that is damaged since is passed
over for the one before.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from crystallm_jax.errors import ModelError
from crystallm_jax.models.checkpoints import DESCRIPTION, STATE, SavedCheckpoints, first_line
from crystallm_jax.train_run.checksums import UNREADABLE, write_checksums
from crystallm_jax.training.sharding import path_name
from crystallm_jax.training.step import TrainState


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    step: int
    state: TrainState
    data_state: dict[str, Any]
    description: dict[str, Any]


class Checkpoints(SavedCheckpoints):
    """The checkpoints of one run folder, written and restored; a context manager that waits for what is being written.

    Args:
        folder: where they are kept, one subfolder a step.
        keep: how many of the newest to keep, the best by validation loss besides; None only reads, and neither
            makes nor removes anything.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        super().__init__(folder)
        self._writes = keep is not None
        self._best = _BestByLoss()
        self._saving = 0
        try:
            self._manager = self._made_manager(keep)
        except OSError as error:
            raise ModelError(f"{self.folder}: cannot be used: {error.strerror or error}") from None
        if self._writes:
            self._best.losses = self._losses()

    def _made_manager(self, keep: int | None) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            item_handlers={
                STATE: ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                DESCRIPTION: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), self._best]),
                create=self._writes,
                # What runs that were killed left half written.
                cleanup_tmp_directories=self._writes,
                # Nothing is read before it is asked for: it may be damaged.
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_up),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._guarded(self._manager.close)
        elif (
            jax.process_count() == 1
        ):  # among several, the others may never come to where this would wait for them
            # A full disk also fails what is still being written; its error is already on its way.
            with contextlib.suppress(OSError, ValueError):
                self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        data_state: dict[str, Any],
        description: dict[str, Any],
        val_loss: float | None,
    ) -> None:
        """Start writing a checkpoint; it is copied off the device before this returns and written behind it.

        Raises:
            ModelError: the checkpoint before could not be written.
        """
        self.wait()
        self._saving = step
        if val_loss is not None:
            self._best.losses[step] = val_loss
        self._guarded(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data_state),
                    description=ocp.args.JsonSave({**description, "val_loss": val_loss}),
                ),
                force=True,
            )
        )

    def check(self) -> None:
        """Look, without waiting, whether the checkpoint that was being written could be.

        Raises:
            ModelError: it could not.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            ModelError: it could not be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored:
        """Read a checkpoint (the newest intact one by default) straight into the shardings of `abstract`.

        Where this run writes, newer ones that are damaged are set aside, under a name that ends in `.damaged`.

        Raises:
            ModelError: there is none, the one asked for is damaged, or its arrays have other shapes.
        """
        restored = self.intact(lambda candidate: self._restored(abstract, candidate), step)
        if self._writes:
            self._set_aside(restored.step)
        return restored

    def _restored(self, abstract: TrainState, step: int) -> Restored:
        # Compared first: a read that fails half-way leaves others of it running.
        _check_shapes(self._manager.item_metadata(step)[STATE], abstract, self.folder / str(step))
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=ocp.args.JsonRestore(),
                description=ocp.args.JsonRestore(),
            ),
        )
        return Restored(step, items.state, items.data, items.description)

    def _sum_up(self) -> None:
        """Sum up a checkpoint that is written, before it gets its name; run by one process, behind the training."""
        for folder in self.folder.glob(f"{self._saving}.*tmp*"):
            write_checksums(folder)

    def find_damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint: looked for by one process, once, and told to all."""
        if step not in self.damage:
            damage = super().find_damage(step) if jax.process_index() == 0 else None
            if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(damage is not None)):
                damage = damage or "its files have changed since they were written"
            self.damage[step] = damage
        return self.damage[step]

    def _set_aside(self, step: int) -> None:
        """Rename the damaged checkpoints after a step: the run will write those steps anew."""
        damaged = [number for number, found in self.damage.items() if found and number > step]
        for number in damaged:
            if jax.process_index() == 0:
                names = (f"{number}.damaged{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 100))))
                free = next(path for path in map(self.folder.joinpath, names) if not path.exists())
                (self.folder / str(number)).rename(free)
            del self.damage[number]
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()

    def _losses(self) -> dict[int, float]:
        """Validation losses by step, of the checkpoints that are there and can be read."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(*UNREADABLE):
                losses[step] = float(self.description(step)["val_loss"])
        return losses

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            # Of those that were to make room for the one that failed, the manager no longer knows.
            newest = max(
                (int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdecimal()), default=None
            )
            kept = (
                "none is complete"
                if newest is None
                else f"the checkpoint of step {newest} is intact: make room and go on with init_from=resume"
            )
            raise ModelError(
                f"{self.folder}: a checkpoint could not be written ({first_line(error)}); {kept}"
            ) from None


class _BestByLoss(PreservationPolicy):
    """Keeps the checkpoint of the lowest validation loss.

    Attributes:
        losses: by step, of the checkpoints that have one.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:  # noqa: ARG002  orbax's
        """Which of the checkpoints to keep."""
        known = {info.step: self.losses[info.step] for info in checkpoints if info.step in self.losses}
        best = min(known, key=lambda step: (known[step], -step)) if known else None
        return [info.step == best for info in checkpoints]


def _check_shapes(saved: Any, wanted: Any, place: Path) -> None:
    """Refuse a checkpoint whose arrays are not those that are asked for."""
    if saved is None:
        raise KeyError("the list of its arrays is missing")
    found, asked = (
        {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved, wanted)
    )
    for name, shape in asked.items():
        if found.get(name) != shape:
            there = f"has shape {found[name]}" if name in found else "is missing"
            raise ModelError(f"{place}: cannot be restored: {name} {there}, where {shape} is asked for")
    if extra := sorted(found.keys() - asked.keys()):
        raise ModelError(
            f"{place}: cannot be restored: it holds {extra[0]}, which this configuration has not: set ema_decay and"
            " optimizer as they were"
        )
