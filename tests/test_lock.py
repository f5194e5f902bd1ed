"""One run at a time in a run folder."""

import os
from pathlib import Path

import pytest

from crystallm_jax.errors import ConfigError
from crystallm_jax.train_run.lock import LOCK_FILE, sole_run


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with (
        sole_run(tmp_path),
        pytest.raises(ConfigError, match=rf"a run is under way there \(process {os.getpid()} on "),
        sole_run(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / LOCK_FILE).write_text("process 1 on a host that was killed\n")
    (tmp_path / ".config.yaml.0123abcd.partial").touch()
    with sole_run(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_written_is_not_held(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with sole_run(tmp_path), sole_run(tmp_path):
        pass
