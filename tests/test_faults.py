"""A short campaign of kills: `benchmarks/faults.py` runs it, and a run that is killed three times loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_three_kills_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    words = ["benchmarks/faults.py", "--kills", "3", "--steps", "60", "--interval", "5", "--out", str(out)]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["results"]
    assert found["kills"] == 3
    assert found["every_step_once"]
    assert found["losses_identical"]
    assert found["states_identical"]
    assert found["left_over"] == []
    # One interval, and what ran while the checkpoint at its end was being written.
    assert found["redone_most"] <= 2 * 5
