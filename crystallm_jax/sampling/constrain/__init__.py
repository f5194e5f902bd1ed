"""Constrained decoding: an automaton of the dialect under which every sample is a well-formed file of its prompt."""

from crystallm_jax.sampling.constrain.advance import advance
from crystallm_jax.sampling.constrain.automaton import Automaton, idle_state
from crystallm_jax.sampling.constrain.back import before_site
from crystallm_jax.sampling.constrain.choices import allowed
from crystallm_jax.sampling.constrain.looks import look
from crystallm_jax.sampling.constrain.state import AutomatonState, Placed, RowPlan, stacked
from crystallm_jax.sampling.constrain.text_layout import Level

__all__ = [
    "Automaton",
    "AutomatonState",
    "Level",
    "Placed",
    "RowPlan",
    "advance",
    "allowed",
    "before_site",
    "idle_state",
    "look",
    "stacked",
]
