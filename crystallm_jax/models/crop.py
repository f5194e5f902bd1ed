"""A model with a shorter context."""

from dataclasses import replace

from crystallm_jax.errors import ModelError
from crystallm_jax.models.model import Model, Moments


def crop_block_size(weights: Model, block_size: int, *, place: str) -> Model:
    """The same model with a shorter context: position embeddings beyond it are dropped, as published.

    Raises:
        ModelError: the model's context is shorter than that.
    """
    if block_size > weights.config.block_size:
        raise ModelError(
            f"{place}: its context is {weights.config.block_size} tokens; block_size={block_size} would need"
            " positions that it never learned"
        )
    table = weights.params["wpe"]["embedding"][:block_size]
    config = replace(weights.config, block_size=block_size)
    return Model(config, {**weights.params, "wpe": {"embedding": table}})


def crop_training(weights: Model, block_size: int, *, place: str) -> Model:
    """The same model with a shorter context, and its moments likewise.

    Raises:
        ModelError: the model's context is shorter than that.
    """
    cropped = crop_block_size(weights, block_size, place=place)
    training = weights.training
    if training is None or training.moments is None:
        return replace(cropped, training=training)
    first, second = (
        crop_block_size(Model(weights.config, tree), block_size, place=place).params
        for tree in (training.moments.first, training.moments.second)
    )
    moments = Moments(training.moments.updates, first, second)
    return replace(cropped, training=replace(training, moments=moments))
