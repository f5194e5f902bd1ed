"""Named arrays in safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by its name once this is loaded
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from crystallm_jax.errors import ModelError


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ModelError(f"{path}: not a safetensors file, or a damaged one: {reason}") from None


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file, readable for whom the folder's new files are.

    Raises:
        OSError: it cannot be written.
    """
    # The library makes files that their owner alone can read: a folder that others share would be of no use to them.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # a full disk, for instance
        raise OSError(str(error)) from None
    path.chmod(mode)
