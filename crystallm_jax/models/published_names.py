"""Published names of parameters, their shapes in files and in memory, and their order in the published optimiser.

Published linear weights are stored as [out, in]; ours as [in, out]. The output layer is the token embedding under a
second name.
"""

from typing import NamedTuple

from crystallm_jax.model.config import ModelConfig


class ParameterEntry(NamedTuple):
    """Where a published tensor lives in our parameters.

    Attributes:
        path: of the parameter.
        shape: of it in our files, a matrix or vector.
        transposed: whether the published tensor is its transpose.
        held: its shape in memory, of the same elements in the same order.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    held: tuple[int, ...]

    @property
    def published_shape(self) -> tuple[int, ...]:
        """Shape of the published tensor."""
        return self.shape[::-1] if self.transposed else self.shape


def parameter_table(config: ModelConfig) -> dict[str, ParameterEntry]:
    """The published name of every parameter of a model."""
    D = config.n_embd
    table = {
        "transformer.wte.weight": ParameterEntry(
            ("wte", "embedding"), (config.vocab_size, D), transposed=False, held=(config.vocab_size, D)
        ),
        "transformer.wpe.weight": ParameterEntry(
            ("wpe", "embedding"), (config.block_size, D), transposed=False, held=(config.block_size, D)
        ),
    }

    def add(
        published: str, path: tuple[str, ...], shape: tuple[int, ...], held: tuple[int, ...] | None = None
    ) -> None:
        held = held or shape
        linear = len(shape) > 1
        table[f"{published}.weight"] = ParameterEntry(
            (*path, "kernel" if linear else "scale"), shape, linear, held
        )
        if config.bias:
            table[f"{published}.bias"] = ParameterEntry(
                (*path, "bias"), shape[-1:], transposed=False, held=held[1:] if linear else held
            )

    for layer in range(config.n_layer):
        published, ours = f"transformer.h.{layer}", f"h_{layer}"
        add(f"{published}.ln_1", (ours, "ln_1"), (D,))
        add(f"{published}.attn.c_attn", (ours, "attn", "c_attn"), (D, 3 * D), held=(D, 3, D))
        add(f"{published}.attn.c_proj", (ours, "attn", "c_proj"), (D, D))
        add(f"{published}.ln_2", (ours, "ln_2"), (D,))
        add(f"{published}.mlp.c_fc", (ours, "mlp", "c_fc"), (D, 4 * D))
        add(f"{published}.mlp.c_proj", (ours, "mlp", "c_proj"), (4 * D, D))
    add("transformer.ln_f", ("ln_f",), (D,))
    return table


class OptimizerOrder(NamedTuple):
    """Published names in the order in which the published optimiser numbers them: decayed ones first.

    Both are sorted as texts, layer 10 before layer 2.
    """

    decayed: tuple[str, ...]
    others: tuple[str, ...]


def optimizer_order(config: ModelConfig) -> OptimizerOrder:
    """The numbering of the published optimiser: weights of linear layers decay; the tied output layer does not."""
    table = sorted(parameter_table(config).items())
    return OptimizerOrder(
        tuple(name for name, entry in table if entry.transposed),
        tuple(name for name, entry in table if not entry.transposed),
    )
