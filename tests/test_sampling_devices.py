"""Many devices: replicas and split models give the samples of one device, and no pages move between devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from crystallm_jax.errors import SamplingError
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.model.inference import prepare_weights
from crystallm_jax.sampling.devices import Placement, placements
from crystallm_jax.sampling.requests import GenerationRequest

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(n_layer=1, n_head=4, n_embd=32, block_size=48, vocab_size=29)

_EIGHT_DEVICES = """
import json, logging, re
import jax, numpy as np
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.sampling import engine, generate
from crystallm_jax.sampling.decode import decoder

config = ModelConfig(n_layer=1, n_head=4, n_embd=32, block_size=48, vocab_size=29)
# Eight times the parameters: logits that tell tokens from each other.
params = jax.tree.map(lambda leaf: 8 * leaf, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
prompts = [np.arange(3 + i % 3, dtype=np.int32) + i % 5 for i in range(12)]
engines = []

class Watched(engine.Engine):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        engines.append(self)

generate.Engine = Watched

def sampled(devices, tensor):
    engines.clear()
    request = generate.GenerationRequest(num_samples=2, max_new_tokens=24, batch_size=12, tensor=tensor)
    batches = generate.generate(
        config, params, prompts, newline_id=3, request=request, devices=jax.devices()[:devices]
    )
    return sorted((one.prompt_index, one.sample_index, one.token_ids) for batch in batches for one in batch)

found = {"devices": jax.device_count(), "one": sampled(1, 1), "two": sampled(2, 1)}
found["engines of two"] = len(engines)
found["eight"] = sampled(8, 4)
messages = []
jax.config.update("jax_log_compiles", True)
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("jax").addHandler(handler)
found["again"] = sampled(8, 4)
found["compiled again"] = [text for text in messages if text.startswith("Compiling jit(decode_steps)")]
jax.config.update("jax_log_compiles", False)
found["places"] = [[device.id for device in one.placement.devices] for one in engines]
one = engines[0]
specs = lambda tree: sorted({str(leaf.sharding.spec) for leaf in jax.tree.leaves(tree)})
found["specs"] = {"log": specs(one._log), "pages": specs(one._pool.blocks)}
found["whole"] = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(one._state))
shape = one._shape
program = decoder("cpu").lower(
    config, shape.rules, weights=one._weights, blocks=one._pool.blocks, table=one._pool.table(), state=one._state,
    log=one._log,
).compile().as_text()
collectives = r"= (\\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
found["collectives"] = [[kind, re.sub("{.*", "", shape)] for shape, kind in re.findall(collectives, program)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT_DEVICES],
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_replicas_on_several_devices_give_the_samples_of_one(found: dict[str, Any]) -> None:
    assert found["devices"] == 8
    assert len(found["one"]) == 24
    assert found["engines of two"] == 2
    assert found["two"] == found["one"]


def test_a_split_model_gives_the_same_samples(found: dict[str, Any]) -> None:
    assert found["places"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found["eight"] == found["one"]


def test_a_split_model_is_compiled_once_and_stays_split(found: dict[str, Any]) -> None:
    assert found["again"] == found["eight"]
    assert found["compiled again"] == []
    by_heads = str(PartitionSpec(None, "tensor"))
    assert found["specs"] == {"log": [by_heads], "pages": [by_heads]}
    assert found["whole"]


def test_two_sums_of_activations_a_layer_are_all_that_a_step_sends(found: dict[str, Any]) -> None:
    # Of the replica's six rows.
    rows = len(found["one"]) // 4
    assert found["collectives"] == [["all-reduce", f"f32[{CONFIG.n_embd},{rows}]"]] * 2 * CONFIG.n_layer


def test_what_cannot_be_split_is_refused() -> None:
    devices: list[Any] = list(range(8))
    with pytest.raises(SamplingError, match="tensor=3: does not divide the 8 devices of this process"):
        placements(CONFIG, 3, devices)
    with pytest.raises(SamplingError, match="tensor=8: does not divide the 4 heads of the model"):
        placements(CONFIG, 8, devices)
    with pytest.raises(SamplingError, match="tensor=0: must be at least 1"):
        GenerationRequest(tensor=0)
    assert [place.devices for place in placements(CONFIG, 4, devices)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert placements(CONFIG, 1) == [Placement((device,)) for device in jax.local_devices()]


def test_weights_are_where_the_engine_is() -> None:
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    placement = placements(CONFIG, 1)[0]
    weights = placement.weights(prepare_weights(CONFIG, params))
    assert {leaf.sharding for leaf in jax.tree.leaves(weights)} == {placement.whole}


@pytest.mark.parametrize(
    ("rows", "variables", "devices"),
    [(16, {}, 2), (15, {}, 1), (64, {"JAX_NUM_CPU_DEVICES": "3"}, 3)],
    ids=["many rows", "few rows", "as the user says"],
)
def test_many_rows_make_two_devices_of_a_cpu(rows: int, variables: dict[str, str], devices: int) -> None:
    code = (
        "import jax; from crystallm_jax.sampling import devices; devices.usable_cores = lambda: 4;"
        f"devices.use_all_cores({rows}); print(len(jax.devices())); devices.use_all_cores(99)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | variables
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(found.stdout) == devices
