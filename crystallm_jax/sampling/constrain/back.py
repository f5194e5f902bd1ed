"""The registers of a row that goes back to the beginning of a site, from what was kept of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.sampling.constrain.nodes import Node
from crystallm_jax.sampling.constrain.state import MAX_ELEMENTS, AutomatonState, Placed


def before_site(state: AutomatonState, site: jax.Array) -> AutomatonState:
    """The registers of rows as they were before the row of a site [B], at level `positions`."""
    kept = jnp.take_along_axis(state.placed, site[:, None, None], axis=1)[:, 0]
    earlier = np.arange(state.placed.shape[1]) < site[:, None]
    whose = state.placed[:, :, Placed.ELEMENT, None] == np.arange(MAX_ELEMENTS)
    atoms = jnp.where(earlier, state.placed[:, :, Placed.MULTIPLICITY], 0)
    return replace(
        state,
        node=jnp.full_like(state.node, Node.ELEMENT),
        room=kept[:, Placed.ROOM],
        index=kept[:, Placed.INDEX],
        taken=kept[:, Placed.TAKEN],
        fixed=kept[:, Placed.FIXED],
        site=site,
        sites=jnp.where(earlier[:, :, None], state.sites, -1),
        remaining=state.counts - jnp.sum(jnp.where(whose, atoms[:, :, None], 0), axis=1),
        passed=site + 1,
    )
