"""Runs of forced tokens: how long they are, what they are, and how to leave them behind at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from crystallm_jax.sampling.constrain.advance import begin_number, enter_field
from crystallm_jax.sampling.constrain.automaton import Automaton
from crystallm_jax.sampling.constrain.nodes import Node, Slot
from crystallm_jax.sampling.constrain.rows import row_run, row_tokens, skip_in_row
from crystallm_jax.sampling.constrain.script import script_end, script_tokens
from crystallm_jax.sampling.constrain.state import AutomatonState


def run_length(automaton: Automaton, state: AutomatonState) -> jax.Array:
    """Int32 [B]: forced tokens that lie ahead; 0 where a choice is free, or the row waits or is done.

    Pieces of the script, and in the table of sites all between a last coordinate and the next multiplicity. A digit
    that happens to be the only one possible counts as a choice.
    """
    run = row_run(automaton, state)
    in_script = jnp.where(state.node == Node.SCRIPT, script_end(state) - state.place, 0)
    return jnp.where(run.inside, run.end - run.place, in_script)


def run_tokens(automaton: Automaton, state: AutomatonState, count: int) -> jax.Array:
    """Int32 [B, count]: the next tokens of the run; anything beyond its end."""
    run = row_run(automaton, state)
    return jnp.where(run.inside[:, None], row_tokens(run, count), script_tokens(state, count))


def skip(automaton: Automaton, state: AutomatonState, count: jax.Array) -> AutomatonState:
    """The registers after so many tokens [B] of the run, at most `run_length`."""
    run = row_run(automaton, state)
    place = state.place + jnp.where(state.node == Node.SCRIPT, count, 0)
    moved, begins = skip_in_row(replace(state, place=place, room=state.room - count), run, count)
    begun = begin_number(automaton, moved, jnp.where(begins, Slot.MULTIPLICITY, -1))
    return enter_field(automaton, begun)
