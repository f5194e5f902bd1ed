"""What a sampling run came to, and `run.json`, which says so."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from crystallm_jax.errors import SamplingError
from crystallm_jax.sample_run.run_folder import RUN_FILE, ResultsFolder
from crystallm_jax.sample_run.sample_tables import Totals


class Session(NamedTuple):
    """What the process did that ended the run, apart from what was there already.

    Attributes:
        found: samples that were there.
        samples: made, with those that were not kept in the end.
        generated_tokens: of these.
        sampling_seconds: until the last sample was made.
        seconds: until all was judged.
    """

    found: int = 0
    samples: int = 0
    generated_tokens: int = 0
    sampling_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of sampling, compilation included."""
        return self.generated_tokens / self.sampling_seconds if self.sampling_seconds else 0.0


class Summary(NamedTuple):
    """What a sampling run came to.

    Attributes:
        totals: of the samples that are kept.
        short: names of the prompts that did not reach the number of valid samples asked for.
        session: how the last process of it fared; what may differ between two runs that are the same.
    """

    totals: Totals
    short: tuple[str, ...]
    session: Session


def write_summary(folder: ResultsFolder, summary: Summary, **settings: Any) -> None:
    """Write `run.json`: settings, what came of it, versions.

    Raises:
        SamplingError: the disk takes no more.
    """
    names = ("jax", "flax", "pymatgen", "pymatgen-core", "spglib", "numpy", "crystallm-jax")
    session = summary.session
    values = {
        **settings,
        **summary.totals._asdict(),
        "short": summary.short,
        "versions": {name: _version(name) for name in names} | {"python": platform.python_version()},
        "session": {**session._asdict(), "tokens_per_second": round(session.tokens_per_second, 1)},
    }
    folder.write(RUN_FILE, json.dumps(values, indent=2) + "\n")


def read_summary(folder: ResultsFolder) -> Summary:
    """The summary of a finished run; this session did nothing.

    Raises:
        SamplingError: `run.json` is damaged.
    """
    path = folder.path / RUN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        totals = Totals(*_picked(values, Totals._fields))
        return Summary(totals, tuple(values["short"]), Session(found=totals.samples))
    except (OSError, ValueError, KeyError) as error:
        raise SamplingError(f"{path}: cannot be read ({error}); choose another --out") from None


def _picked(values: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [values[name] for name in names]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # Run from a checkout that was not installed.
        return None
