"""Settings of a training run, under the published names."""

import math
from dataclasses import dataclass
from typing import Literal

from crystallm_jax.data.packing import Windows
from crystallm_jax.errors import ConfigError
from crystallm_jax.model.config import AttentionBackend, DType, Layers, ModelConfig, Remat

# Whether several processes train together: where settings or the cluster's environment say so, always, or never. YAML
# and the command line read an `on` and an `off` without quotes as true and false.
Distributed = Literal["auto", "on", "off", True, False]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Keys and defaults are those of the published `train.py` unless marked (new).

    Attributes:
        out_dir: the run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`.
        dataset: a prepared folder.
        init_from: `scratch`, `resume` (from `out_dir`), or the path of a model to start from.
        init_state: (new) what is taken from `init_from=PATH`: its `weights` alone, or `all`, the optimiser's moments
            and the step too, so that the run goes on where the other stood.
        existing_run: (new) what to do when `out_dir` holds a run already and `init_from` is not `resume`: `refuse`, or
            `resume` it, so that a scheduler can give the same command again.
        eval_interval: optimiser steps between evaluations.
        checkpoint_interval: (new) optimiser steps between checkpoints; 0 takes `eval_interval`. Evaluations are
            followed by one in any case: it may be the best.
        log_interval: optimiser steps between lines of `metrics.jsonl`.
        eval_iters_train: batches of the training set in an evaluation (0 skips it).
        eval_iters_val: batches of the validation set in an evaluation.
        eval_only: evaluate once and stop.
        always_save_checkpoint: accepted for published files and ignored: checkpoints are always saved.
        validate: evaluate on the validation set.
        keep_checkpoints: (new) checkpoints kept on disk, the newest; the best by validation loss is kept besides.
        patience: (new) evaluations in a row without a better validation loss after which the run ends; 0 never.
        sample_interval: (new) optimiser steps between samplings whose validity is measured; 0 never.
        sample_count: (new) how many samples each of them draws.
        tensorboard: (new) also write TensorBoard's event files, into `out_dir/tensorboard`.
        wandb: (new) also report to Weights & Biases.
        wandb_project: (new) its project.
        profile_steps: (new) steps of which a trace is written, from the tenth on; 0 writes none.
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
        optimizer: (new) `adamw`, as published, or `muon` for the kernels and AdamW for the rest.
        weight_decay: of AdamW, on attention and MLP kernels only.
        beta1: of AdamW.
        beta2: of AdamW.
        grad_clip: greatest global norm of a step's gradient; 0 switches clipping off.
        decay_lr: whether there is a schedule; otherwise `learning_rate` throughout, from the first step.
        lr_schedule: (new) `cosine`, as published, or `wsd`: warm-up, a stable rate, and a linear decay at the end
            (S. Hu et al., arXiv 2404.06395).
        warmup_iters: steps of linear warm-up from 0.
        lr_decay_iters: the step at which the cosine reaches `min_lr`.
        decay_iters: (new) of `wsd`: the last steps before `max_iters`, over which the rate falls to `min_lr`; 0 keeps
            it stable to the end, for a run that others branch off.
        min_lr: lowest rate.
        ema_decay: (new) of an exponential moving average of the weights, which is then what is evaluated and exported;
            0 keeps none.
        non_finite: (new) what to do with a step whose loss or gradient is not finite: `stop`, with the ids of its
            records written out, or `skip` and count it.
        device: accepted for published files and ignored: JAX takes the accelerator that is installed.
        dtype: arithmetic of the model.
        attention: (new) attention implementation.
        layers: (new) `unrolled`, or `scanned`: one compiled block run over stacked parameters, which compiles faster.
        remat: (new) what the backward pass computes again instead of keeping: nothing (`none`), all but the products
            of linear layers (`dots`), or whole blocks (`full`).
        compilation_cache: (new) folder of compiled steps; `auto` is $JAX_COMPILATION_CACHE_DIR, else one in the user's
            cache folder on accelerators and none on a CPU; empty or null for none.
        compile: accepted for published files and ignored: the step is always compiled.
        underrep_p: probability that a micro-batch is made of under-represented records alone.
        seed: (new) of initialisation, dropout and the order of the data.
        data_parallel: (new) size of the mesh's `data` axis; -1 takes the devices that the others leave.
        fsdp: (new) size of the mesh's `fsdp` axis, over which parameters and optimiser state are sharded.
        tensor: (new) size of the mesh's `tensor` axis, over which heads and the MLP's hidden units are split.
        distributed: (new) whether several processes train together.
        coordinator_address: (new) host:port of process 0, where the cluster does not say it.
        num_processes: (new) how many processes, likewise.
        process_id: (new) which of them this is, likewise.
        local_device_ids: (new) devices of this process, as `0,1,2,3`; by default all that it sees.
    """

    out_dir: str = "out"
    dataset: str = ""
    init_from: str = "scratch"
    init_state: Literal["weights", "all"] = "weights"
    existing_run: Literal["refuse", "resume"] = "refuse"

    eval_interval: int = 250
    checkpoint_interval: int = 0
    log_interval: int = 1
    eval_iters_train: int = 0
    eval_iters_val: int = 200
    eval_only: bool = False
    always_save_checkpoint: bool = False
    validate: bool = False
    keep_checkpoints: int = 3
    patience: int = 0
    sample_interval: int = 0
    sample_count: int = 32
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "crystallm"
    profile_steps: int = 0

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
    optimizer: Optimizer = "adamw"
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    decay_lr: bool = True
    lr_schedule: Schedule = "cosine"
    warmup_iters: int = 2000
    lr_decay_iters: int = 600_000
    decay_iters: int = 0
    min_lr: float = 6e-5
    ema_decay: float = 0.0
    non_finite: Literal["stop", "skip"] = "stop"

    device: str = "cuda"
    dtype: DType = "bfloat16"
    attention: AttentionBackend = "auto"
    layers: Layers = "unrolled"
    remat: Remat = "none"
    compilation_cache: str | None = "auto"
    compile: bool = True
    underrep_p: float = 0.0
    seed: int = 1337
    data_parallel: int = -1
    fsdp: int = 1
    tensor: int = 1
    distributed: Distributed = "auto"
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: str | None = None

    def __post_init__(self) -> None:
        if self.distributed not in ("auto", "on", "off"):
            object.__setattr__(self, "distributed", "on" if self.distributed else "off")
        for name in (
            "eval_interval",
            "log_interval",
            "keep_checkpoints",
            "gradient_accumulation_steps",
            "batch_size",
            "max_iters",
            "sample_count",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in (
            "learning_rate",
            "min_lr",
            "weight_decay",
            "grad_clip",
            "warmup_iters",
            "decay_iters",
            "checkpoint_interval",
            "eval_iters_train",
            "eval_iters_val",
            "patience",
            "sample_interval",
            "profile_steps",
        ):
            if not 0 <= getattr(self, name) < math.inf:  # a comparison with NaN is false
                raise ConfigError(f"{name}={getattr(self, name)}: must be finite and not negative")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: must be at least 0 and below 2^32")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.init_state == "all" and self.init_from == "scratch":
            raise ConfigError("init_state=all needs a model to go on from: give init_from=PATH")
        self._check_schedule()
        if self.patience > 0 and not (self.validate and self.eval_iters_val > 0):
            raise ConfigError(
                f"patience={self.patience} needs a validation loss: set validate=true and eval_iters_val above 0"
            )
        if not 0 <= self.underrep_p <= 1:
            raise ConfigError(f"underrep_p={self.underrep_p}: must be a probability, from 0 to 1")

    def _check_schedule(self) -> None:
        if self.decay_iters > 0 and self.lr_schedule != "wsd":
            raise ConfigError(
                f"decay_iters={self.decay_iters} needs lr_schedule=wsd: the cosine ends at lr_decay_iters"
            )
        if not self.decay_lr:
            return
        if self.lr_schedule == "cosine" and self.lr_decay_iters <= self.warmup_iters:
            raise ConfigError(
                f"lr_decay_iters={self.lr_decay_iters} must be above warmup_iters={self.warmup_iters}"
                " (or set decay_lr=false)"
            )
        if self.lr_schedule == "wsd" and self.decay_iters > self.max_iters - self.warmup_iters:
            raise ConfigError(
                f"decay_iters={self.decay_iters} and warmup_iters={self.warmup_iters} are more than"
                f" max_iters={self.max_iters}: the decay is the end of the run"
            )

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
            layers=self.layers,
            remat=self.remat,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step reads, the padding of packed rows among them."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size
