"""The shape of a model, as the published configurations name it."""

from dataclasses import dataclass
from typing import Literal

from crystallm_jax.errors import ConfigError

DType = Literal["float32", "bfloat16"]
AttentionBackend = Literal["auto", "xla", "blocked", "cudnn", "splash"]
Layers = Literal["unrolled", "scanned"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and arithmetic of a GPT.

    Attributes:
        n_layer: L, transformer blocks.
        n_head: H, attention heads.
        n_embd: D, width; a multiple of `n_head`.
        block_size: longest context in tokens.
        vocab_size: V.
        bias: whether LayerNorm and linear layers carry biases.
        dropout: rate after the embeddings, after each block's two branches.
        attention_dropout: rate on attention probabilities; None takes `dropout`, as published.
        dtype: arithmetic of the blocks; parameters, logits and the softmax are float32 always.
        attention: which implementation; `auto` chooses by platform.
        layers: blocks one after the other, each with parameters of its own (`h_0`, `h_1`, ...), or one block scanned
            over parameters stacked along a leading L (`h`): for training, where compile time matters.
        remat: what a training step computes again in its backward pass: `none`; `dots`: all but the products of linear
            layers; `full`: all but each block's input.
    """

    n_layer: int = 8
    n_head: int = 8
    n_embd: int = 512
    block_size: int = 1024
    vocab_size: int = 371
    bias: bool = False
    dropout: float = 0.0
    attention_dropout: float | None = None
    dtype: DType = "float32"
    attention: AttentionBackend = "auto"
    layers: Layers = "unrolled"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ConfigError(f"{name}={rate}: must be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def attention_dropout_rate(self) -> float:
        """The rate on attention probabilities, resolved."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


def flops_per_token(config: ModelConfig, num_params: int) -> float:
    """Floating-point operations of one training token (forward and backward) at full context.

    6 for each parameter but the position embeddings, and 12 L D T for attention (PaLM, appendix B; the
    published code counts the same).
    """
    matmul_params = num_params - config.block_size * config.n_embd
    return 6 * matmul_params + 12 * config.n_layer * config.n_embd * config.block_size
