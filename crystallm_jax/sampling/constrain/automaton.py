"""The automaton itself: a level of the dialect that samples are held to, and the plan of a row under it."""

from dataclasses import dataclass
from typing import get_args

import jax
import numpy as np

from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.constrain.plan import plan_row
from crystallm_jax.sampling.constrain.state import AutomatonState, RowPlan, empty_row
from crystallm_jax.sampling.constrain.text_layout import Level


@dataclass(frozen=True)
class Automaton:
    """The dialect as an automaton; what the device needs of it is static under `jit`.

    Attributes:
        level: `syntax`: every text is a well-formed file of the dialect. `composition`: and has exactly the cell
            composition of its data line. `symmetry`: and its cell and its sites' multiplicities are ones that its
            space group has. `positions`: and its sites lie on Wyckoff positions of these multiplicities, and its
            volume is that of its cell; what else holds of its atoms is looked at as they are written
            (`constrain.looks`).
    """

    level: Level

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise SamplingError(f"constrain={self.level!r}: must be one of {', '.join(get_args(Level))}")

    def holds(self, level: Level) -> bool:
        """Whether it holds all that a level does."""
        levels = get_args(Level)
        return bool(levels.index(self.level) >= levels.index(level))

    def plan(self, text: np.ndarray, *, limit: int) -> RowPlan:
        """How a row goes on after its text so far. The same texts and limits are planned once; do not change a plan.

        Args:
            text: token ids [T], the prompt included: `data_` alone, or up to the end of the data line, or up to the
                space group or the end of its line.
            limit: most tokens that the row may have in all.

        Raises:
            SamplingError: no such text, a space group that cannot hold the composition (from level `symmetry` on), or a
                limit below what the shortest such file takes.
        """
        return plan_row(self.level, np.asarray(text, "<u2").tobytes(), limit)


def idle_state(automaton: Automaton, batch_size: int) -> AutomatonState:
    """The registers of a batch of rows that are all done."""
    del automaton
    # On the host: as many small programs would be compiled.
    rows = {name: np.repeat(value[None], batch_size, axis=0) for name, value in empty_row().items()}
    return AutomatonState(**jax.device_put(rows))
