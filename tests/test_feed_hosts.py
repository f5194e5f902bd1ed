"""Two processes that share a run: what they feed together is what one would, and so are the losses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer
from crystallm_jax.data.preparing.writer import StoreWriter

ROOT = Path(__file__).parents[1]
DEVICES = 4
# Sums over devices are in another order where they cross processes.
TOLERANCE = 1e-5

# Arguments: the store, how many processes there are, which this is, the first one's port.
_PROCESS = """
import json, sys
import jax
import numpy as np

folder, hosts, host, port = sys.argv[1], *map(int, sys.argv[2:])
if hosts > 1:
    jax.distributed.initialize(
        f"localhost:{port}", hosts, host, initialization_timeout=60, shutdown_timeout_seconds=20
    )

from crystallm_jax.data.feed import open_feed
from crystallm_jax.data.rows import evaluation_batches, open_rows
from crystallm_jax.data.store import TokenStore
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps, initial_state

store = TokenStore.open(folder)
mesh = make_mesh(2, 2)
report = {"devices": mesh.size, "local": jax.local_device_count()}
for windows in ("starts", "packed"):
    config = TrainConfig(
        gradient_accumulation_steps=2, batch_size=8, block_size=24, n_layer=1, n_head=2, n_embd=16, dropout=0.1,
        learning_rate=1e-2, min_lr=1e-3, warmup_iters=1, lr_decay_iters=8, dtype="float32",
    )
    model_config = config.model_config(store.header.vocab_size)
    steps = compile_steps(config, model_config, mesh)
    state = initial_state(config, model_config, steps)
    cut = {"windows": windows, "block_size": 24, "batch_size": 8, "micro_batches": 2, "seed": 3, "underrep_p": 0.4}
    feed, whole = open_feed(store, **cut, host=host, hosts=hosts), open_feed(store, **cut)
    losses, same = [], []
    for step in range(5):
        if step == 3:  # goes on from where it stood, in the middle of an epoch
            saved = json.loads(json.dumps(feed.get_state()))
            feed.close()
            feed = open_feed(store, **cut, host=host, hosts=hosts)
            feed.set_state(saved)
        place = steps.micro_batches
        batch = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(place, leaf), next(feed))
        for leaf, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(next(whole)), strict=True):
            assert leaf.shape == expected.shape
            same += [np.array_equal(shard.data, expected[shard.index]) for shard in leaf.addressable_shards]
        if windows == "packed":  # a second compilation would show nothing new
            state, metrics = steps.train(state, batch)
            losses.append([*np.asarray(metrics.micro_losses).tolist(), float(metrics.grad_norm)])
    rows = open_rows(store, block_size=24, windows=windows, seed=3)
    evaluated = [
        float(steps.evaluate(state.params, jax.device_put(batch, steps.batch)))
        for batch in evaluation_batches(rows, batch_size=8, count=2, seed=3)
        if windows == "packed"
    ]
    report[windows] = {"losses": losses, "same": same, "evaluated": evaluated, "state": feed.get_state()}
    feed.close()
    whole.close()
print(json.dumps(report))
"""


def _store(folder: Path) -> Path:
    data_id = CIFTokenizer().token_to_id["data_"]
    rng = np.random.default_rng(0)
    with StoreWriter(folder) as out:
        for i in range(60):
            tokens = np.concatenate([[data_id], rng.integers(0, data_id, 5 + i % 9)])
            out.add(str(i), tokens, underrepresented=i % 6 == 0)
        out.commit(sources=(), options={}, counts={}, versions={})
    return folder


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def _reports(folder: Path, hosts: int) -> list[dict[str, Any]]:
    """What each of some processes saw, their devices four together."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // hosts)}
    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(folder), str(hosts), str(host), str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in processes]
    finally:
        # One that fails leaves the others waiting for it.
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, ended, strict=True):
        assert process.returncode == 0, error
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Any]]:
    return _reports(folder, 2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return _reports(folder, 1)[0]


@pytest.mark.parametrize(("windows", "leaves"), [("starts", 1), ("packed", 4)])
def test_every_device_holds_its_rows_of_the_batch_that_one_process_would_read(
    windows: str, leaves: int, together: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for report in together:
        assert (report["devices"], report["local"]) == (DEVICES, DEVICES // 2)
        assert report[windows]["same"] == [True] * (5 * leaves * report["local"])
        assert report[windows]["state"] == alone[windows]["state"]


def test_two_processes_take_the_steps_of_one(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone["packed"]
    assert alone["local"] == DEVICES
    for report in together:
        for name in ("losses", "evaluated"):
            np.testing.assert_allclose(report["packed"][name], expected[name], rtol=0, atol=TOLERANCE)
    assert len(np.unique(np.array(expected["losses"])[:, :2])) == 10
