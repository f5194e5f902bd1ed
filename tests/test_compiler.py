"""What the compiler is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from crystallm_jax.model.compiler import (
    keep_programs,
    known_options,
    step_options,
    use_compilation_cache,
)
from crystallm_jax.training.sharding import make_mesh


@pytest.fixture(autouse=True)
def _restored_cache() -> Iterator[None]:
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_one_device_needs_no_options() -> None:
    assert step_options(make_mesh(1, 1, jax.devices()[:1])) == {}


def test_an_option_that_the_compiler_does_not_know_is_left_out_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = {"xla_dump_hlo_as_text": False}
    assert known_options({**known, "xla_gpu_of_another_version": True}) == known
    assert "xla_gpu_of_another_version is left out" in caplog.text


def test_the_cache_is_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert use_compilation_cache(str(tmp_path / "cache")) == tmp_path / "cache"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    assert use_compilation_cache("") is None
    assert jax.config.jax_compilation_cache_dir is None
    # On a CPU there is none unless asked for.
    assert use_compilation_cache("auto") is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    assert use_compilation_cache("auto") == tmp_path / "named"


def test_programs_are_kept_by_the_kind_of_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("CRYSTALLM_CACHE", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_programs() is None
    jax.config.update("jax_enable_compilation_cache", True)
    folder = keep_programs()
    assert folder is not None
    assert folder.parent == tmp_path / "compiled"
    assert folder.name.startswith("cpu-")
    assert keep_programs() == folder
    monkeypatch.setenv("CRYSTALLM_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert keep_programs() is None
    assert "cannot be made" in caplog.text


def test_a_second_start_compiles_nothing_and_two_at_once_share_the_folder(tmp_path: Path) -> None:
    code = (
        "import jax, jax.numpy as jnp\n"
        "from crystallm_jax.model.compiler import keep_programs\n"
        "keep_programs()\n"
        "found = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: found.append(event))\n"
        "print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))[0, 0]))\n"
        "print(found.count('/jax/compilation_cache/cache_misses'))\n"
    )
    environment = {**os.environ, "CRYSTALLM_CACHE": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = [sys.executable, "-c", code]
    pair = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    values = {process.communicate(timeout=120)[0].split()[0] for process in pair}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    value, misses = again.stdout.split()
    assert values == {value}
    assert misses == "0"
