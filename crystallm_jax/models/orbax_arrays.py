"""Arrays of an orbax checkpoint, read to the host: some of them, whatever devices and layout they were saved from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crystallm_jax.errors import ModelError
from crystallm_jax.train_run.checksums import UNREADABLE

_COMMITTED = "commit_success.txt"


def read_arrays(folder: Path, wanted: Callable[[tuple[str, ...]], bool]) -> dict[str, Any]:
    """Read the arrays of a checkpoint whose paths are wanted: nested dicts of NumPy arrays; the rest stays on disk.

    Args:
        folder: that holds the tree.
        wanted: of a leaf's path; numbers of tuples and lists are written as text.

    Raises:
        ValueError, LookupError, TypeError, OSError: whatever orbax says of a folder that is damaged.
    """
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(folder.absolute()).tree

    def asked(path: Any, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if wanted(_names(path)) else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(asked, saved)
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    read = handler.restore(folder.absolute(), args=ocp.args.PyTreeRestore(item=item, restore_args=on_host))
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(read):
        if leaf is not ocp.PLACEHOLDER:
            *before, last = _names(path)
            inner = found
            for name in before:
                inner = inner.setdefault(name, {})
            inner[last] = np.asarray(leaf)
    return found


def read_params(folder: Path) -> dict[str, Any]:
    """Read all arrays of a folder that `write_params` wrote.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder of orbax parameters")
    try:
        return read_arrays(folder, lambda _: True)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]
        raise ModelError(f"{folder}: not a folder of orbax parameters, or a damaged one: {reason}") from None


def write_params(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write nested arrays as an orbax checkpoint; the folder appears under its name when it is complete.

    Raises:
        ModelError: it is there already, or cannot be written.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), dict(arrays))
        # It says where on this machine the folder lay, which is of no use to those who get it.
        for marker in folder.rglob(_COMMITTED):
            marker.write_text("committed\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise ModelError(f"{folder}: cannot be written: {str(error).splitlines()[0]}") from None


def _names(path: Any) -> tuple[str, ...]:
    """The path of a leaf as texts; keys of dicts, fields and numbers alike."""
    return tuple(
        str(next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind))) for key in path
    )
