"""The script that compares sets of samples: what it counts, and over what."""

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("match_rate")


@pytest.fixture
def texts(fixtures: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in (fixtures / "validity").iterdir()}


class Here:
    """A pool without processes; whatever reads the text `slow` takes too long."""

    def schedule(self, function: Callable[..., Any], args: Sequence[Any], timeout: float) -> Future[Any]:
        future: Future[Any] = Future()
        if "slow" in args[0]:
            future.set_exception(TimeoutError())
        else:
            future.set_result(function(*args))
        return future


def test_what_matches_an_earlier_one_or_does_not_parse_is_not_distinct(
    script: ModuleType, texts: dict[str, str]
) -> None:
    salt, rutile = texts["rock_salt"], texts["rutile"]
    assert script.count_distinct([salt, texts["rock_salt_raw"], "no crystal", rutile, salt]) == 2
    assert script.count_distinct(["no crystal"]) == 0


def test_all_samples_and_compositions_stay_in_the_denominators(
    script: ModuleType, texts: dict[str, str], tmp_path: Path
) -> None:
    made = {
        # A composition whose first sample is the true one but called invalid, and one of which nothing is good.
        "a__1.cif": (texts["rock_salt"], "False"),
        "a__2.cif": (texts["rutile"], "True"),
        "b__1.cif": ("no crystal", "False"),
        "b__2.cif": ("no crystal", "False"),
        # One that takes too long, and one with a single sample.
        "c__1.cif": ("slow", "False"),
        "c__2.cif": ("slow", "False"),
        "d__1.cif": (texts["rutile"], "True"),
    }
    for name, (text, _) in made.items():
        (tmp_path / name).write_text(text)
    rows = [
        {"id": name[0], "sample": name[3], "file": name, "valid": valid}
        for name, (_, valid) in reversed(made.items())
    ]
    truth = dict.fromkeys("abc", texts["rock_salt"]) | {"d": texts["rutile"]}
    found = script.judged(tmp_path, rows, truth, pool=Here())
    assert found["samples"] == 7
    assert found["valid"] == pytest.approx(2 / 7, abs=1e-4)
    assert found["compositions"] == 4
    assert found["all"] == {"matched": 2, "match_rate": 0.5, "mean_rmsd": pytest.approx(0, abs=1e-4)}
    assert found["valid_only"]["match_rate"] == 0.25
    # Both samples of the first, none of the second.
    assert found["distinct"] == 0.5
    assert (found["distinct_of_compositions"], found["distinct_timed_out"]) == (2, 1)
    assert "50.0% match (mean RMSD 0.000), 25.0% valid and matching, 50.0% distinct" in script.line_of(
        "out", found
    )
