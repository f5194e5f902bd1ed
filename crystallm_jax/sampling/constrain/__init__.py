"""Constrained decoding: an automaton of the dialect under which every sample is a well-formed file of its prompt."""

from crystallm_jax.sampling.constrain.advance import advance
from crystallm_jax.sampling.constrain.automaton import Automaton, idle_state
from crystallm_jax.sampling.constrain.choices import allowed
from crystallm_jax.sampling.constrain.layout import Level
from crystallm_jax.sampling.constrain.state import AutomatonState, RowPlan

__all__ = [
    "Automaton",
    "AutomatonState",
    "Level",
    "RowPlan",
    "advance",
    "allowed",
    "idle_state",
]
