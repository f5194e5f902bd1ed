"""The very steps that train and decode, compiled for a slice that is not at hand."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from crystallm_jax.data.packing import Batch
from crystallm_jax.errors import ModelError
from crystallm_jax.model import ModelConfig, count_params, flops_per_token, init_params
from crystallm_jax.model.attention import choose_backend
from crystallm_jax.model.inference import prepare_weights
from crystallm_jax.model.pages import PageTable, empty_log, empty_pages
from crystallm_jax.sampling.decode import Rules, decoder
from crystallm_jax.sampling.device_rows import empty_rows
from crystallm_jax.sampling.devices import placements
from crystallm_jax.sampling.generate import page_size
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.page_pool import pages_of_longest
from crystallm_jax.tpu_estimate.count import Costs, count_costs, count_round
from crystallm_jax.tpu_estimate.groups import Groups, spanned_axes
from crystallm_jax.tpu_estimate.hlo import Module, parse_module
from crystallm_jax.tpu_estimate.roofline import Prediction, collective_seconds, predict
from crystallm_jax.tpu_estimate.topology import Slice
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps

# What libtpu says when a program does not fit: two sentences, by what of it is too large.
_EXCEEDED = (
    re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm"),
    re.compile(r"HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)"),
)


class MemoryExceededError(ModelError):
    """A program that does not fit the memory of its device."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, as the compiler plans them.

    Attributes:
        arguments: what the program is given.
        outputs: what it returns, without what takes the place of arguments.
        temporaries: what it needs between.
        code: of the program itself.
        capacity: of the device.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    capacity: int

    @property
    def peak(self) -> int:
        """All of it together: the most that can be in use at once."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes of the mesh.

    Attributes:
        kind: `all-gather`, ...
        axes: along which the devices of a group differ.
        group: devices in a group.
        count: how often a step runs them.
        overlapped: how many of those the compiler spread over other work.
        bytes: summed over them, of the array that a group holds (all-gather, reduce-scatter) or of a device's own.
        seconds: predicted for all of them.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    overlapped: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """A compiled program.

    Attributes:
        program: `training step` or `decode step`.
        placed: the slice that it was compiled for.
        mesh: sizes by axis.
        tokens: read by one run, over all devices.
        model_flops: that the model's formula asks for them, over all devices.
        memory: on each device.
        costs: of each device, counted.
        traffic: of each device, summed by kind and axes.
        prediction: of each device.
        compile_seconds: that the compiler took.
        versions: of what compiled it.
        module: the program itself.
        positions: for each position in the mesh, the number of its device in the slice.
    """

    program: str
    placed: Slice
    mesh: dict[str, int]
    tokens: int
    model_flops: float
    memory: Memory
    costs: Costs
    traffic: tuple[Traffic, ...]
    prediction: Prediction
    compile_seconds: float
    versions: dict[str, str]
    module: Module = field(repr=False)
    positions: tuple[int, ...] = field(repr=False)

    def utilisation(self, seconds: float) -> float:
        """Model FLOP/s over the peak (MFU) of steps that take so long."""
        return self.model_flops / self.devices / seconds / self.placed.chip.peak_flops

    @property
    def devices(self) -> int:
        """How many devices the program runs on."""
        return math.prod(self.mesh.values())


def compile_training(config: TrainConfig, vocab_size: int, placed: Slice) -> Report:
    """Compile the training step of a run.

    Raises:
        ConfigError: the mesh does not fit the slice, or the batch or the width the mesh.
        MemoryExceededError: the step does not fit the chip's memory.
    """
    mesh = make_mesh(config.data_parallel, config.fsdp, placed.devices, tensor=config.tensor)
    model_config = _for_tpu(config.model_config(vocab_size))
    steps = compile_steps(config, model_config, mesh)
    batch = _abstract_batch(config, steps.micro_batches)
    return _report(
        "training step",
        steps.train,
        (steps.abstract, batch),
        {},
        placed=placed,
        mesh=mesh,
        tokens=config.tokens_per_step,
        model_flops=config.tokens_per_step
        * flops_per_token(model_config, count_params(steps.abstract.params)),
    )


def with_micro_batches(report: Report, compiled: int, wanted: int) -> Report:
    """What a training step compiled with several micro-batches would be with another number of them.

    The loop over them is the same but for its length; memory is as compiled.
    """
    counted = replace(
        report,
        tokens=report.tokens * wanted // compiled,
        model_flops=report.model_flops * wanted / compiled,
    )
    return _recounted(counted, count_costs(report.module, report.devices, outer_rounds=wanted))


def compile_decoding(config: TrainConfig, vocab_size: int, placed: Slice, *, batch_size: int) -> Report:
    """Compile the loop that decodes, on as many devices of the slice as `tensor` says, and count a token of each row.

    The pool of pages is one block, as on accelerators, with room for half a context of each row: rows that come and go
    in a continuous batch are half done on average.

    Raises:
        SamplingError: `tensor` does not divide the heads.
        MemoryExceededError: the step does not fit the chip's memory.
    """
    model_config = replace(
        _for_tpu(config.model_config(vocab_size)),
        layers="unrolled",
        remat="none",
        dropout=0.0,
        attention_dropout=0.0,
    )
    tensor = config.tensor
    mesh = make_mesh(1, 1, placed.devices[:tensor], tensor=tensor)
    placement = placements(model_config, tensor, list(mesh.devices.flat))[0]
    params = jax.eval_shape(lambda key: init_params(model_config, key), jax.random.key(0))
    named = jax.eval_shape(partial(_decoding_arguments, model_config, batch_size), params)
    where = dict.fromkeys(named, placement.whole) | dict.fromkeys(("blocks", "log"), placement.by_heads)
    report = _report(
        "decode step",
        decoder("tpu"),
        (model_config, Rules(SamplingMethod(), newline_id=0)),
        {
            **{
                name: _placed(tree, jax.tree.map(lambda _, name=name: where[name], tree))
                for name, tree in named.items()
            },
            "weights": _placed(named["weights"], placement.weight_shardings(named["weights"])),
        },
        placed=placed,
        mesh=mesh,
        tokens=batch_size,
        model_flops=batch_size * _decode_flops(model_config, count_params(params)),
    )
    return _recounted(report, count_round(report.module, report.devices))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def _decoding_arguments(config: ModelConfig, rows: int, params: dict) -> dict[str, Any]:
    """What `decode_steps` is given for so many rows."""
    S = page_size("tpu")
    N = pages_of_longest(config, S)
    count = rows * -(-config.block_size // (2 * S))
    pages = jnp.zeros(count, jnp.int32)
    return {
        "weights": prepare_weights(config, params),
        "blocks": (empty_pages(config, count, S, config.dtype),),
        "table": PageTable(pages, pages, jnp.zeros((rows, N), jnp.int32), jnp.int32(1)),
        "state": empty_rows(rows, config.block_size + 1, config.vocab_size, automaton=None),
        "log": empty_log(config, rows, S, config.dtype),
    }


def _recounted(report: Report, costs: Costs) -> Report:
    return replace(
        report,
        costs=costs,
        traffic=_traffic(costs, report.placed, report.positions, report.mesh),
        prediction=predict(costs, report.placed, report.positions),
    )


def _for_tpu(config: ModelConfig) -> ModelConfig:
    """The model with what `auto` means on a TPU, not on this machine."""
    backend = choose_backend(
        config.attention,
        dtype=config.dtype,
        dropout_rate=config.attention_dropout_rate,
        tokens=config.block_size,
        head_dim=config.head_dim,
        segmented=False,
        platform="tpu",
    )
    return replace(config, attention=backend)


def _decode_flops(config: ModelConfig, num_params: int) -> float:
    """Of one token at full context: the forward part alone, a third of a training token's."""
    return flops_per_token(config, num_params) / 3


def _abstract_batch(config: TrainConfig, sharding: NamedSharding) -> Batch:
    leading = (config.gradient_accumulation_steps, config.batch_size)
    read = (*leading, config.block_size)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tokens = array((*leading, config.block_size + 1), jnp.uint16)
    if config.windows != "packed":
        return Batch(tokens)
    return Batch(tokens, array(read, jnp.uint16), array(read, jnp.uint16), array(read, jnp.bool_))


def _report(
    program: str,
    function: Any,
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
    *,
    placed: Slice,
    mesh: Mesh,
    tokens: int,
    model_flops: float,
) -> Report:
    begun = time.perf_counter()
    lowered = function.trace(*arguments, **named).lower(lowering_platforms=("tpu",))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _exceeded(program, placed, error) from None
    seconds = time.perf_counter() - begun
    module = parse_module(compiled.as_text())
    costs = count_costs(module, mesh.size)
    numbers = {device: number for number, device in enumerate(placed.devices)}
    positions = tuple(numbers[device] for device in mesh.devices.flat)
    sizes = dict(mesh.shape)
    return Report(
        program=program,
        module=module,
        positions=positions,
        placed=placed,
        mesh=sizes,
        tokens=tokens,
        model_flops=model_flops,
        memory=_memory(compiled, placed),
        costs=costs,
        traffic=_traffic(costs, placed, positions, sizes),
        prediction=predict(costs, placed, positions),
        compile_seconds=seconds,
        versions={name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")},
    )


def _exceeded(program: str, placed: Slice, error: Exception) -> Exception:
    found = next((match for pattern in _EXCEEDED if (match := pattern.search(str(error)))), None)
    if found is None:
        return error
    needed, available = (re.sub(r"([KMGT]?)$", r" \1iB", size, count=1) for size in found.groups())
    return MemoryExceededError(
        f"the {program} does not fit on {placed.name}: it needs {needed} of the {available} that a"
        f" {placed.chip.name} has for it; lower batch_size (and raise gradient_accumulation_steps), set remat=dots or"
        " remat=full, or raise fsdp"
    )


def _memory(compiled: Any, placed: Slice) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        capacity=placed.chip.memory_bytes,
    )


def _traffic(
    costs: Costs, placed: Slice, positions: Sequence[int], mesh: Mapping[str, int]
) -> tuple[Traffic, ...]:
    coordinates = [placed.coordinates[device] for device in positions]
    axes: dict[Groups, tuple[str, ...]] = {}
    sums: dict[tuple[str, tuple[str, ...], int], Traffic] = {}
    for found in costs.collectives:
        if found.groups not in axes:
            axes[found.groups] = spanned_axes(found.groups, mesh)
        key = (found.kind, axes[found.groups], len(found.groups[0]))
        before = sums.get(key, Traffic(*key, 0, 0, 0, 0.0))
        sums[key] = replace(
            before,
            count=before.count + found.times,
            overlapped=before.overlapped + found.times * found.overlapped,
            bytes=before.bytes + found.times * found.bytes,
            seconds=before.seconds + found.times * collective_seconds(found, placed, coordinates),
        )
    return tuple(sorted(sums.values(), key=lambda one: -one.seconds))
