"""What the compiler is told."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from crystallm_jax.training.compiler import known_options, step_options, use_compilation_cache
from crystallm_jax.training.sharding import make_mesh


@pytest.fixture(autouse=True)
def _restored_cache() -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


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
