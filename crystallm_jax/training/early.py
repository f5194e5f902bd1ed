"""When to end a run early: validation losses that no longer fall."""

import math
from typing import Any


class Patience:
    """Counts the evaluations in a row that found no better validation loss.

    Args:
        limit: how many end the run; 0 never does.

    Attributes:
        best: the lowest loss so far; None before the first.
        best_step: where it was found.
        waited: evaluations since.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def note(self, step: int, val_loss: float | None) -> None:
        """Take the evaluation after a step into account; None where there was none. NaN is not better."""
        if val_loss is None:
            return
        if math.isfinite(val_loss) and (self.best is None or val_loss < self.best):
            self.best, self.best_step, self.waited = val_loss, step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        return 0 < self._limit <= self.waited

    def __str__(self) -> str:
        best = "none" if self.best is None else f"{self.best:.4f}, of step {self.best_step}"
        return f"{self.waited} evaluations since the best validation loss, {best} (patience={self._limit})"

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must keep of it."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
