"""Names of the mesh axes that a training step is split over.

Here, left of training, because one attention kernel must be told how its operands are split.
"""

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

# Batches are split over both: fsdp shards parameters and data over the same devices.
BATCH_AXES = (DATA, FSDP)
