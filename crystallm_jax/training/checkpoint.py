"""Checkpoints of a run: the only place that uses orbax.

A checkpoint holds the training state, the data iterator's state and a description (configuration, validation loss,
versions). It appears under its final name when it is complete: a kill or a full disk in the middle of writing
leaves the one before as the newest.
"""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from crystallm_jax.errors import ModelError
from crystallm_jax.training.sharding import path_name
from crystallm_jax.training.step import TrainState

_VALIDATION_LOSS = "val_loss"
_LONGEST_REASON = 500


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    step: int
    state: TrainState
    data_state: dict[str, Any]
    description: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder; a context manager that waits for what is being written.

    Args:
        folder: where they are kept, one subfolder a step.
        keep: how many of the newest to keep, the best by validation loss besides; None only reads, and neither
            makes nor removes anything.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder = folder.absolute()
        best = BestN(
            get_metric_fn=lambda metrics: -metrics.get(_VALIDATION_LOSS, float("inf")),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "description": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                create=keep is not None,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._guarded(self._manager.close)
        else:
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
        self._guarded(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data_state),
                    description=ocp.args.JsonSave(description),
                ),
                metrics=None if val_loss is None else {_VALIDATION_LOSS: val_loss},
                force=True,
            )
        )

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            ModelError: it could not be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def describe(self, step: int | None = None) -> dict[str, Any]:
        """The description of a checkpoint (the newest by default), without its arrays."""
        step = self._existing(step)
        return self._manager.restore(
            step, args=ocp.args.Composite(description=ocp.args.JsonRestore())
        ).description

    def restore(self, abstract: TrainState, step: int | None = None) -> Restored:
        """Read a checkpoint (the newest by default) straight into the shardings of `abstract`.

        Raises:
            ModelError: there is none, or its arrays have other shapes.
        """
        step = self._existing(step)
        place = self.folder / str(step)
        try:
            # Compared first: a read that fails half-way leaves others of it running.
            _check_shapes(self._manager.item_metadata(step)["state"], abstract, place)
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    data=ocp.args.JsonRestore(),
                    description=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ModelError(f"{place}: cannot be restored: {_first_line(error)}") from None
        return Restored(step, items.state, items.data, items.description)

    def _existing(self, step: int | None) -> int:
        steps = self._manager.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            raise ModelError(f"{self.folder}: no complete checkpoint{wanted}; start with init_from=scratch")
        return self._manager.latest_step() if step is None else step

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            newest = self._manager.latest_step()
            kept = (
                "none is complete"
                if newest is None
                else f"the checkpoint of step {newest} is intact: make room and go on with init_from=resume"
            )
            raise ModelError(
                f"{self.folder}: a checkpoint could not be written ({_first_line(error)}); {kept}"
            ) from None


def _check_shapes(saved: Any, wanted: Any, place: Path) -> None:
    """Refuse a checkpoint whose arrays are not those that are asked for."""
    found, asked = (
        {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved, wanted)
    )
    for name, shape in asked.items():
        if found.get(name) != shape:
            there = f"has shape {found[name]}" if name in found else "is missing"
            raise ModelError(f"{place}: cannot be restored: {name} {there}, where {shape} is asked for")


def _first_line(error: BaseException) -> str:
    """What went wrong, without the description of the store that tensorstore appends."""
    line = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
    return line.split(" [tensorstore_spec", 1)[0][:_LONGEST_REASON]
