"""Sampling: a compiled, cached decode loop over batches of prompts."""
