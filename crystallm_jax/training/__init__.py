"""Training: configuration, sharding, the compiled step, checkpoints and the loop."""
