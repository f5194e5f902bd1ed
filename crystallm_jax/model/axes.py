"""Names of the mesh axes that a training step is split over, and the one split that the model states itself.

How parameters are split is training's affair (`training.sharding`). Of what lies between them the compiler derives
the split, but for the residual stream, which it would otherwise split over its width now and then.
"""

import jax
from jax.sharding import PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

# Batches are split over both: fsdp shards parameters and data over the same devices.
BATCH_AXES = (DATA, FSDP)


def split_by_rows(x: jax.Array) -> jax.Array:
    """X [B, ...] with its rows split over the batch axes, where `jax.sharding.use_abstract_mesh` gives a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
