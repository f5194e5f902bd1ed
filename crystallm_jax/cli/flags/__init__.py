"""What the verbs of the command line are asked with: one module a verb with `add_parser`, light enough for --help."""

from typing import Any

from crystallm_jax.cli.flags import compile as compile_flags
from crystallm_jax.cli.flags import convert, download, embeddings, info, prepare, sample, score, train


def add_verbs(verbs: Any) -> None:
    """Add all verbs, in the order in which help names them."""
    for verb in (prepare, info, train, sample, score, compile_flags, convert, download, embeddings):
        verb.add_parser(verbs)
