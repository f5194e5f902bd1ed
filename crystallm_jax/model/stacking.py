"""Two layouts of the parameters: a tree a layer (`h_0`, `h_1`, ...), or one tree (`h`) with a leading L.

The first is how models are kept, exchanged and decoded; the second is what `layers: scanned` trains.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STACKED = "h"


def layer_name(layer: int) -> str:
    """Name of a layer's own tree."""
    return f"h_{layer}"


def stacked(params: dict[str, Any], n_layer: int) -> dict[str, Any]:
    """Parameters for `layers: scanned` from those a layer."""
    names = [layer_name(layer) for layer in range(n_layer)]
    rest = {name: value for name, value in params.items() if name not in names}
    return {
        **rest,
        STACKED: jax.tree.map(_stack, *(params[name] for name in names)),
    }


def _stack(*leaves: Any) -> Any:
    # What lies on the host stays there: one device need not hold what is to be sharded over many.
    return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)


def unstacked(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters a layer from those of `layers: scanned`; what is unstacked already is returned as it is."""
    if STACKED not in params:
        return params
    blocks = params[STACKED]
    count = jax.tree.leaves(blocks)[0].shape[0]
    rest = {name: value for name, value in params.items() if name != STACKED}
    return {
        **rest,
        **{layer_name(layer): jax.tree.map(lambda leaf, i=layer: leaf[i], blocks) for layer in range(count)},
    }
