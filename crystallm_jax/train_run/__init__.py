"""The folder of a training run: its configuration, its metrics, its lock, and whether its checkpoints are whole."""
