"""Settings of a training run, under the published names."""

import math
from dataclasses import dataclass

from crystallm_jax.data.packing import Windows
from crystallm_jax.errors import ConfigError
from crystallm_jax.model.config import AttentionBackend, DType, ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Keys and defaults are those of the published `train.py` unless marked (new).

    Attributes:
        out_dir: the run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`.
        dataset: a prepared folder.
        init_from: `scratch`, `resume` (from `out_dir`), or the path of a model to start from.
        eval_interval: optimiser steps between evaluations.
        checkpoint_interval: (new) optimiser steps between checkpoints; 0 takes `eval_interval`.
        log_interval: optimiser steps between lines of `metrics.jsonl`.
        eval_iters_train: batches of the training set in an evaluation (0 skips it).
        eval_iters_val: batches of the validation set in an evaluation.
        eval_only: evaluate once and stop.
        always_save_checkpoint: accepted for published files and ignored: checkpoints are always saved.
        validate: evaluate on the validation set.
        keep_checkpoints: (new) checkpoints kept on disk, the newest; the best by validation loss is kept besides.
        gradient_accumulation_steps: micro-batches a step; their gradients are summed, as published.
        batch_size: sequences a micro-batch, over all devices.
        block_size: tokens a sequence.
        windows: (new) how rows are cut: `starts` and `anywhere` are the published ways, windows that begin at CIF
            starts or anywhere and run on into the next CIFs; `packed` puts whole CIFs into rows, each at position 0
            and blind to the others, so that training sees what sampling asks.
        n_layer: transformer blocks.
        n_head: attention heads.
        n_embd: width.
        dropout: rate after embeddings and branches.
        attention_dropout: (new) rate on attention probabilities; null takes `dropout`, as published.
        bias: biases in LayerNorm and linear layers.
        learning_rate: peak rate.
        max_iters: optimiser steps (the published code makes one more).
        weight_decay: of AdamW, on attention and MLP kernels only.
        beta1: of AdamW.
        beta2: of AdamW.
        grad_clip: greatest global norm of a step's gradient; 0 switches clipping off.
        decay_lr: whether there is a schedule; otherwise `learning_rate` throughout, from the first step.
        warmup_iters: steps of linear warm-up from 0.
        lr_decay_iters: the step at which the cosine reaches `min_lr`.
        min_lr: lowest rate.
        device: accepted for published files and ignored: JAX takes the accelerator that is installed.
        dtype: arithmetic of the model.
        attention: (new) attention implementation.
        compile: accepted for published files and ignored: the step is always compiled.
        underrep_p: probability that a micro-batch is made of under-represented records alone.
        seed: (new) of initialisation, dropout and the order of the data.
        data_parallel: (new) size of the mesh's `data` axis; -1 takes the devices that `fsdp` leaves.
        fsdp: (new) size of the mesh's `fsdp` axis, over which parameters and optimiser state are sharded.
    """

    out_dir: str = "out"
    dataset: str = ""
    init_from: str = "scratch"

    eval_interval: int = 250
    checkpoint_interval: int = 0
    log_interval: int = 1
    eval_iters_train: int = 0
    eval_iters_val: int = 200
    eval_only: bool = False
    always_save_checkpoint: bool = False
    validate: bool = False
    keep_checkpoints: int = 3

    gradient_accumulation_steps: int = 40
    batch_size: int = 64
    block_size: int = 2048
    windows: Windows = "starts"

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    attention_dropout: float | None = None
    bias: bool = False

    learning_rate: float = 6e-4
    max_iters: int = 600_000
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    decay_lr: bool = True
    warmup_iters: int = 2000
    lr_decay_iters: int = 600_000
    min_lr: float = 6e-5

    device: str = "cuda"
    dtype: DType = "bfloat16"
    attention: AttentionBackend = "auto"
    compile: bool = True
    underrep_p: float = 0.0
    seed: int = 1337
    data_parallel: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for name in (
            "eval_interval",
            "log_interval",
            "keep_checkpoints",
            "gradient_accumulation_steps",
            "batch_size",
            "max_iters",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in (
            "learning_rate",
            "min_lr",
            "weight_decay",
            "grad_clip",
            "warmup_iters",
            "checkpoint_interval",
            "eval_iters_train",
            "eval_iters_val",
        ):
            if not 0 <= getattr(self, name) < math.inf:  # a comparison with NaN is false
                raise ConfigError(f"{name}={getattr(self, name)}: must be finite and not negative")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: must be at least 0 and below 2^32")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.decay_lr and self.lr_decay_iters <= self.warmup_iters:
            raise ConfigError(
                f"lr_decay_iters={self.lr_decay_iters} must be above warmup_iters={self.warmup_iters}"
                " (or set decay_lr=false)"
            )
        if not 0 <= self.underrep_p <= 1:
            raise ConfigError(f"underrep_p={self.underrep_p}: must be a probability, from 0 to 1")

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that this run trains."""
        return ModelConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            vocab_size=vocab_size,
            bias=self.bias,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            attention=self.attention,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step reads, the padding of packed rows among them."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size
