"""Compiling for a TPU slice that is not at hand, and counting what the compiler made."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from crystallm_jax.errors import ConfigError
from crystallm_jax.tpu_estimate.compile_ahead import (
    MemoryExceededError,
    Report,
    _exceeded,
    compile_decoding,
    compile_training,
    with_micro_batches,
)
from crystallm_jax.tpu_estimate.count import Collective, Costs, convolution_flops, count_costs
from crystallm_jax.tpu_estimate.estimate import as_dict, as_text
from crystallm_jax.tpu_estimate.groups import parse_groups, spanned_axes
from crystallm_jax.tpu_estimate.hlo import parse_module, parse_shapes
from crystallm_jax.tpu_estimate.roofline import HOP_SECONDS, collective_seconds, predict
from crystallm_jax.tpu_estimate.search import candidate_meshes
from crystallm_jax.tpu_estimate.topology import Slice, closed_sides, open_slice
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.chips import DEVICES, find_device

V5E = next(device for device in DEVICES if device.name == "TPU v5e")
V5P = next(device for device in DEVICES if device.name == "TPU v5p")
CONFIG = TrainConfig(
    gradient_accumulation_steps=2,
    batch_size=8,
    block_size=128,
    n_layer=2,
    n_head=2,
    n_embd=128,
    fsdp=4,
    layers="scanned",
)
VOCABULARY = 371

# A matrix product in a scan of five rounds over two devices, each with half of the weights; by hand:
# 5 × 2 × 8 × 32 × 16 FLOPs, 5 all-gathers of a whole bf16[32,16], 5 all-reduces of f32[8,16] in fusions of their own.
SCAN = """\
HloModule scan, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%product (p.0: bf16[8,32], p.1: bf16[32,16]) -> f32[8,16] {
  %p.0 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[32,16]{1,0} parameter(1)
  ROOT %conv = f32[8,16]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%condition (state.0: (s32[], bf16[8,32], bf16[16,16], f32[8,16], s32[])) -> pred[] {
  %state.0 = (s32[], bf16[8,32], bf16[16,16], f32[8,16], s32[]) parameter(0)
  %i.0 = s32[] get-tuple-element(%state.0), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.0, %limit), direction=LT
}

%body (state: (s32[], bf16[8,32], bf16[16,16], f32[8,16], s32[])) -> (s32[], bf16[8,32], bf16[16,16]) {
  %state = (s32[], bf16[8,32]{1,0:S(1)}, bf16[16,16], f32[8,16], /*index=4*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,32]{1,0:S(1)} get-tuple-element(%state), index=1
  %half = bf16[16,16] get-tuple-element(%state), index=2
  %one = s32[] get-tuple-element(%state), index=4, frontend_attributes={note={
"several": "lines"
}}
  %next = s32[] add(%i, %one)
  %start = (bf16[16,16], bf16[32,16]) all-gather-start(%half), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %whole = bf16[32,16] all-gather-done(%start)
  %y = f32[8,16] fusion(%x, %whole), kind=kOutput, calls=%product
  %z = f32[8,16] all-reduce(%y), channel_id=2, replica_groups=[1,2]<=[2], to_apply=%sum
  ROOT %out = (s32[], bf16[8,32], bf16[16,16], f32[8,16], s32[]) tuple(%next, %x, %half, %z, %one)
}

ENTRY %main (arg.0: bf16[8,32], arg.1: bf16[16,16]) -> f32[8,16] {
  %arg.0 = bf16[8,32]{1,0:S(1)} parameter(0)
  %arg.1 = bf16[16,16] parameter(1)
  %zero = s32[] constant(0)
  %step = s32[] constant(1)
  %empty = f32[8,16] constant({...})
  %copied = s32[] copy(%zero)
  %init = (s32[], bf16[8,32], bf16[16,16], f32[8,16], s32[]) tuple(%copied, %arg.0, %arg.1, %empty, %step)
  %loop = (s32[], bf16[8,32], bf16[16,16], f32[8,16], s32[]) while(%init), condition=%condition, body=%body
  ROOT %result = f32[8,16] get-tuple-element(%loop), index=3
}
"""


def _slice(sides: tuple[int, ...], chip: object = V5E) -> Slice:
    coordinates = tuple(
        tuple(n // math.prod(sides[:axis]) % side for axis, side in enumerate(sides))
        for n in range(math.prod(sides))
    )
    return Slice("drawn", chip, (), coordinates, sides, closed_sides(chip, sides))


def test_a_sharded_product_in_a_scan_is_counted_as_by_hand() -> None:
    costs = count_costs(parse_module(SCAN), 2)
    assert costs.flops == costs.passes == 5 * 2 * 8 * 32 * 16
    assert costs.unknown_loops == 0
    assert costs.collectives == [
        Collective("all-gather", 32 * 16 * 2, ((0, 1),), 5, True),
        Collective("all-reduce", 8 * 16 * 4, ((0, 1),), 5, False),
    ]
    # A round reads the half and the whole weights and the product, and writes the whole weights, the product and the
    # sum; x lies beside the cores. Before the loop a counter is copied.
    assert costs.bytes == 5 * (16 * 16 * 2 + 2 * 32 * 16 * 2 + 3 * 8 * 16 * 4 + 3 * 4) + 2 * 4


def test_the_rounds_of_the_outer_loop_can_be_chosen() -> None:
    module = parse_module(SCAN)
    assert count_costs(module, 2, outer_rounds=10).flops == 2 * count_costs(module, 2).flops


def test_a_loop_without_a_counter_counts_once_and_is_told() -> None:
    costs = count_costs(parse_module(SCAN.replace("direction=LT", "direction=NE")), 2)
    assert costs.unknown_loops == 1
    assert costs.flops == 2 * 8 * 32 * 16


def test_what_the_compiler_notes_of_a_loop_goes_before_what_is_derived() -> None:
    noted = SCAN.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert count_costs(parse_module(noted), 2).flops == 7 * 2 * 8 * 32 * 16


def test_pieces_of_one_collective_count_once() -> None:
    twice = SCAN.replace(
        "  %whole = ",
        "  %again = (bf16[16,16], bf16[32,16]) all-gather-start(%half), channel_id=1\n  %whole = ",
    )
    assert len(count_costs(parse_module(twice), 2).collectives) == 2


def test_a_collective_that_is_spread_over_other_work_is_told() -> None:
    text = """\
%piece (p: bf16[16,16]) -> bf16[32,16] {
  %p = bf16[16,16] parameter(0)
  %g = bf16[32,16] all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = bf16[32,16] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

ENTRY %main (a: bf16[16,16]) -> bf16[32,16] {
  %a = bf16[16,16] parameter(0)
  ROOT %f = bf16[32,16] fusion(%a), kind=kCustom, calls=%piece
}
"""
    assert [found.overlapped for found in count_costs(parse_module(text), 2).collectives] == [True]
    plain = text.replace("AsyncCollectiveStart", "Other")
    assert [found.overlapped for found in count_costs(parse_module(plain), 2).collectives] == [False]


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse_module("HloModule nothing\n")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", [(12, 1)]),
        ("(f32[4], /*index=1*/(s8[], pred[3]{0}), token[])", [(16, 0), (1, 0), (3, 0), (0, 0)]),
        ("f8e4m3fn[8]", [(8, 0)]),
        ("s4[8]", [(4, 0)]),
    ],
)
def test_shapes_have_their_bytes_and_memory(text: str, sizes: list[tuple[int, int]]) -> None:
    assert [(shape.bytes, shape.space) for shape in parse_shapes(text)] == sizes


@pytest.mark.parametrize(
    ("left", "right", "result", "rest", "products"),
    [
        # [8, 32] times [32, 16].
        ("8,32", "32,16", "8,16", "dim_labels=bf_io->bf", 8 * 16 * 32),
        # A batch of 2 × 4 products [5, 3] by [3, 5], as TPUs write one: the holes are not computed.
        (
            "2,4,5,3",
            "2,4,5,3",
            "2,4,5,5",
            "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=01bf_01oi->01bf",
            2 * 4 * 5 * 5 * 3,
        ),
        # A window of 3 over 10 places with padding: 8 × 3 + 2 × 2 meet a value.
        ("10,1,1", "3,1,1", "10,1,1", "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 28),
    ],
)
def test_convolutions_count_what_meets_a_value(
    left: str, right: str, result: str, rest: str, products: int
) -> None:
    text = (
        f"ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{result}] {{\n"
        f"  %a = f32[{left}] parameter(0)\n  %b = f32[{right}] parameter(1)\n"
        f"  ROOT %c = f32[{result}] convolution(%a, %b), {rest}, operand_precision={{highest,highest}}\n}}\n"
    )
    module = parse_module(text)
    entry = module.computations[module.entry]
    assert convolution_flops(entry, entry.root) == 2 * products
    assert count_costs(module, 1).passes == 6 * 2 * products


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%sum", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("to_apply=%sum", ((0, 1, 2, 3),)),
    ],
)
def test_groups_are_read_in_every_form(attributes: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_groups(attributes, 4) == groups


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown replica groups"):
        parse_groups("replica_groups=<new form>", 4)


def test_groups_name_the_axes_along_which_they_differ() -> None:
    mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    assert spanned_axes(((0, 1), (2, 3)), mesh) == ("fsdp",)
    assert spanned_axes(((0, 2), (1, 3)), mesh) == ("data",)
    assert spanned_axes(((0, 1, 2, 3),), mesh) == ("data", "fsdp")


def test_sides_of_a_torus_close_as_pods_are_built() -> None:
    assert closed_sides(V5E, (16, 16)) == (True, True)
    assert closed_sides(V5E, (8, 16)) == (False, True)
    assert closed_sides(V5P, (4, 4, 8)) == (True, True, True)
    assert closed_sides(V5P, (2, 4, 4)) == (False, False, False)


def test_a_gather_takes_the_links_that_its_group_spans() -> None:
    size, link = 2**30, V5E.link_bandwidth
    line, ring = _slice((4, 4)), _slice((16, 16))
    row = Collective("all-gather", size, (tuple(range(4)),), 1, False)
    assert collective_seconds(row, line, line.coordinates) == pytest.approx(
        0.75 * size / link + 3 * HOP_SECONDS
    )
    row = Collective("all-gather", size, (tuple(range(16)),), 1, False)
    assert collective_seconds(row, ring, ring.coordinates) == pytest.approx(
        15 / 16 * size / (2 * link) + 8 * HOP_SECONDS
    )
    # Every other chip of a row: two groups share its links.
    half = Collective("all-gather", size, (tuple(range(0, 16, 2)),), 1, False)
    assert collective_seconds(half, ring, ring.coordinates) == pytest.approx(
        7 / 8 * size / link + 8 * HOP_SECONDS
    )
    plane = Collective("all-reduce", size, (tuple(range(256)),), 1, False)
    assert collective_seconds(plane, ring, ring.coordinates) == pytest.approx(
        2 * 255 / 256 * size / (4 * link) + 2 * 16 * HOP_SECONDS
    )


def test_a_prediction_bounds_by_what_takes_longest() -> None:
    placed = _slice((2, 2))
    reduce = Collective("all-reduce", 5 * 10**9, ((0, 1, 2, 3),), 2, False)
    costs = Costs(flops=1e12, passes=197e12, bytes=819e9 / 2, collectives=[reduce])
    found = predict(costs, placed, range(4))
    assert found.compute == 1.0
    assert found.memory == 0.5
    # Twice, 2 × 3/4 × 5 GB over two links of 50 GB/s.
    assert found.communication == pytest.approx(0.15, rel=1e-3)
    assert found.overlapped == 1.0
    assert found.serial == pytest.approx(1.15, rel=1e-3)


def test_every_device_of_the_table_is_found_by_its_own_kind() -> None:
    for device in DEVICES:
        assert {find_device(f"NVIDIA {kind} made up") for kind in device.kinds} == {device}
    assert find_device("TPU v5 lite").name == "TPU v5e"
    assert find_device("TPU v5").name == "TPU v5p"
    assert find_device("TPU v6 lite").name == "TPU v6e"
    assert find_device("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert find_device("NVIDIA L40").peak_flops == 181e12  # not the L4's
    assert find_device("NVIDIA GH200 480GB").name == "NVIDIA GH200"
    assert [find_device(kind) for kind in ("cpu", "NVIDIA RTX A1000", "NVIDIA T400 4GB")] == [None] * 3


def test_meshes_that_do_not_divide_are_not_tried() -> None:
    found = list(candidate_meshes(8, n_head=8, n_embd=64, batch_size=8))
    assert (8, 1, 1) in found
    assert (2, 4, 1) in found
    assert (1, 8, 1) in found
    assert (1, 4, 2) in found
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 8 for mesh in found)
    assert list(candidate_meshes(8, n_head=8, n_embd=64, batch_size=7)) == []
    assert {mesh.tensor for mesh in candidate_meshes(8, n_head=3, n_embd=64, batch_size=8)} == {1}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("v5e", "not one of"),
        ("v9:2x2", "not one of"),
        ("v5e:2x2x2", "2 sides"),
        ("v5p:2x2", "3 sides"),
        ("v5e:3x3", "no such slice"),
    ],
)
def test_slices_that_there_are_not_are_named(name: str, reason: str) -> None:
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match=reason):
        open_slice(name)


def test_without_libtpu_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crystallm_jax.tpu_estimate.topology.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        open_slice("v5e:2x2")


@pytest.fixture(scope="module")
def placed() -> Slice:
    pytest.importorskip("libtpu")
    return open_slice("v5e:2x2")


@pytest.fixture(scope="module")
def trained(placed: Slice) -> Iterator[Report]:
    return compile_training(CONFIG, VOCABULARY, placed)


def _expected_flops() -> float:
    """Of the step on each of four devices: products of layers and head forwards and twice backwards, of the lookups'
    gradients once, and of the attention kernel nine of which the block of 128 tokens hides nothing."""
    L, D, T, H = CONFIG.n_layer, CONFIG.n_embd, CONFIG.block_size, CONFIG.n_head
    rows = CONFIG.batch_size // 4
    tokens = rows * T
    products = 6 * tokens * (L * 12 * D * D + VOCABULARY * D)
    lookups = 2 * tokens * VOCABULARY * D + 2 * T * T * D
    attention = 9 * 2 * rows * H * T * T * (D // H) * L
    return CONFIG.gradient_accumulation_steps * (products + lookups + attention)


def test_the_compiled_training_step_computes_what_the_formula_says(trained: Report) -> None:
    assert trained.costs.flops == pytest.approx(_expected_flops(), rel=0.02)
    assert trained.costs.unknown_loops == trained.costs.kernels_unknown == 0
    assert trained.tokens == 2 * 8 * 128


def test_sharded_parameters_are_gathered_and_their_gradients_scattered(trained: Report) -> None:
    moved = {(one.kind, one.axes) for one in trained.traffic}
    assert {axes for _, axes in moved} == {("fsdp",)}
    kinds = {kind for kind, _ in moved}
    assert kinds & {"all-gather", "collective-permute"}
    assert kinds & {"reduce-scatter", "all-reduce", "collective-permute"}
    # Twice for each micro-batch, in bfloat16, but for what a device has itself: no activations are sent around.
    kernels = CONFIG.n_layer * 12 * CONFIG.n_embd**2
    moved_bytes = sum(one.bytes for one in trained.traffic)
    assert moved_bytes < 2 * 2 * (2 + 4) * (kernels + (VOCABULARY + CONFIG.block_size) * CONFIG.n_embd)


def test_memory_and_prediction_are_sane(trained: Report) -> None:
    state = 3 * 4 * (CONFIG.n_layer * 12 * CONFIG.n_embd**2) / 4
    assert state < trained.memory.arguments < trained.memory.peak < trained.memory.capacity == 16 * 2**30
    found = trained.prediction
    assert 0 < found.overlapped <= found.serial
    assert 0 < trained.utilisation(found.serial) <= trained.utilisation(found.overlapped) < 1
    more = with_micro_batches(trained, 2, 6)
    assert more.costs.flops == pytest.approx(3 * trained.costs.flops, rel=0.01)
    assert more.tokens == 3 * trained.tokens


def test_the_report_says_it_for_people_and_machines(trained: Report) -> None:
    text = as_text(trained)
    for part in ("4 × TPU v5e", "fsdp 4", "it fits", "prediction, not a measurement", "assumed"):
        assert part in text
    assert json.loads(json.dumps(as_dict(trained)))["flops"]["compiled"] == trained.costs.flops


def test_the_decode_step_compiles_for_one_chip(placed: Slice) -> None:
    # So long a context that the pages are most of what it takes.
    config = replace(CONFIG, block_size=512)
    report = compile_decoding(config, VOCABULARY, placed, batch_size=64)
    assert report.devices == 1
    assert report.traffic == ()
    # Of products with the cache the compiler makes element-wise work: those with the parameters are left.
    kernels = config.n_layer * 12 * config.n_embd**2 + VOCABULARY * config.n_embd
    assert report.costs.flops == pytest.approx(2 * 64 * kernels, rel=0.02)
    assert report.costs.unknown_loops == 0
    # Pages for half a context of each row, which stay where and as they are.
    pages = 2 * config.n_layer * 64 * (config.block_size // 2) * config.n_embd * 2
    assert pages < report.memory.arguments
    assert report.memory.temporaries + report.memory.outputs < pages


def test_a_split_decode_step_sends_two_sums_of_activations_a_layer(placed: Slice) -> None:
    report = compile_decoding(replace(CONFIG, tensor=2), VOCABULARY, placed, batch_size=16)
    assert report.devices == 2
    (sent,) = report.traffic
    assert (sent.kind, sent.axes, sent.count) == ("all-reduce", ("tensor",), 2 * CONFIG.n_layer)
    assert sent.bytes == sent.count * 4 * 16 * CONFIG.n_embd


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.96G of 15.75G hbm. Exceeded by 3.21G",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.96G)"
        " exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_does_not_fit_says_what_it_needs(message: str) -> None:
    error = _exceeded("training step", _slice((2, 2)), RuntimeError(message))
    assert isinstance(error, MemoryExceededError)
    assert "needs 18.96 GiB of the 15.75 GiB" in str(error)
    assert "remat=full" in str(error)


def test_what_cannot_be_compiled_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "crystallm_jax", "compile", "--topology", "v5e:2x2", "batch_size=6"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "crystallm compile: batch_size=6 is not a multiple of the 4 devices it is split over\n"
    )
