"""Where records are prepared makes no difference to what comes out: a Ray cluster of two workers."""

import json
from pathlib import Path

import pytest

from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.errors import DataError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_a_ray_cluster_of_two_workers_gives_the_same_bytes(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    hang = (fixtures / "data" / "rocksalt.cif").read_text()
    source = tmp_path / "more.jsonl"
    rows = [{"id": f"salt-{i}", "cif": hang.replace("3.98800000", f"{3.5 + i / 50:.8f}")} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad", "cif": "?"}]))
    inputs = [fixtures / "data", source]
    alone = prepare(inputs, tmp_path / "alone", execution=Execution(workers=0), progress=False)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        spread = prepare(inputs, tmp_path / "ray", execution=Execution(executor="ray"), progress=False)
    finally:
        ray.shutdown()
    assert spread.n_kept == alone.n_kept == 45
    assert dict(spread.reasons) == dict(alone.reasons)
    for name in ("train.bin", "train.starts.npy", "train.ids.txt", "dropped.csv", "meta.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_ray_that_is_not_installed_is_one_line(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'crystallm-jax\[ray\]'"):
        prepare([fixtures / "data"], tmp_path / "out", execution=Execution(executor="ray"), progress=False)
    assert not (tmp_path / "out").exists()
