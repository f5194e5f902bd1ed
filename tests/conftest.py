"""Shared fixtures: where the golden files and the real crystals are, when they are there."""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test fills the folder of whoever runs it.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# The same examples in every run: a change is to be refused for what it does, not for what was drawn.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_device() -> None:
    """See that this process has one device, whatever a command that a test runs in it would rather have."""
    import jax

    jax.devices()


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"no {path}: set {variable} to the folder")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """The published implementation's recorded inputs and outputs; skips where they are not."""
    return _folder("CRYSTALLM_GOLDEN", SHARED / "golden")


@pytest.fixture(scope="session")
def crystals() -> Path:
    """Real crystals, a folder a data set; skips where they are not."""
    return _folder("CRYSTALLM_CRYSTALS", SHARED / "data")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small fixtures of our own."""
    return FIXTURES
