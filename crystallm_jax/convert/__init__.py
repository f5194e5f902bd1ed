"""Checkpoints of other programs, in and out."""

from crystallm_jax.convert.published import PublishedCheckpoint, read_published

__all__ = ["PublishedCheckpoint", "read_published"]
