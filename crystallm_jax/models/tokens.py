"""Vocabularies that travel with models, compared with this package's."""

from collections.abc import Sequence

from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.errors import ModelError


def check_tokens(tokens: Sequence[str], *, place: str) -> None:
    """Refuse a vocabulary under whose ids other tokens are meant here.

    Args:
        tokens: in the order of their ids.
        place: where they come from, for the message.

    Raises:
        ModelError: one of them is another, or there are more or fewer.
    """
    dialect = "the model speaks another dialect"
    for number, (theirs, ours) in enumerate(zip(tokens, TOKENS, strict=False)):
        if theirs != ours:
            raise ModelError(
                f"{place}: its token {number} is {theirs!r}, this package's is {ours!r}: {dialect}"
            )
    if len(tokens) != len(TOKENS):
        raise ModelError(f"{place}: it has {len(tokens)} tokens, this package has {len(TOKENS)}: {dialect}")
