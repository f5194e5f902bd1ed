"""Few sizes: whatever differs in size from call to call is padded to one of them, for each is another program."""

from collections.abc import Sequence

import numpy as np

# Fewer rows cost no less than so many.
_FEWEST = 16


def padded_count(count: int) -> int:
    """The size that so many are padded to: a power of two."""
    return 1 << max(count - 1, 0).bit_length()


def padded_rows(count: int) -> int:
    """The size that so many rows are padded to."""
    return max(padded_count(count), _FEWEST)


def padded(values: np.ndarray | Sequence[int], size: int, *, fill: int) -> np.ndarray:
    """Values [R, ...] with rows of `fill` after them; int32 if they come as a sequence."""
    array = values if isinstance(values, np.ndarray) else np.array(values, np.int32)
    rest = np.full((size - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, rest])
