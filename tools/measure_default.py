"""What a model is worth: validation losses of whole files, and validity of samples for held-out compositions."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from crystallm_jax.api import CrystalModel, load_model
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import ModelError, SamplingError
from crystallm_jax.evaluation import ValidatorPool
from crystallm_jax.files import new_file
from crystallm_jax.models.crop import crop_block_size
from crystallm_jax.models.kinds import read_model
from crystallm_jax.models.model import Model
from crystallm_jax.models.parameters import named_arrays
from crystallm_jax.sample_run import ResultsFolder, sample_into
from crystallm_jax.sampling.constrain import Automaton, Level
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.prompt_files import read_prompts
from crystallm_jax.sampling.prompts import Prompt, unique_ids
from crystallm_jax.sampling.requests import GenerationRequest
from crystallm_jax.signals import StopRequest
from crystallm_jax.training.evaluate import FilesLoss, loss_of_files

TEMPERATURES = (1.0, 0.5)
CONSTRAINTS: tuple[Level | None, ...] = (None, "symmetry", "positions")
TOP_K = 10
TOO_LONG = "too_long"
"""Why a composition has no sample: even its shortest text does not fit the context."""


class Validity(NamedTuple):
    """One sample for each composition, judged.

    Attributes:
        temperature: of the samples.
        constrain: what they were held to; None to nothing.
        samples: one a composition, whether it could be made or not.
        valid: how many passed the four checks.
        reasons: how many of the others failed at what first.
    """

    temperature: float
    constrain: Level | None
    samples: int
    valid: int
    reasons: Mapping[str, int]

    @property
    def share(self) -> float:
        """Of valid ones among all."""
        return self.valid / self.samples


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        name: of the model.
        digest: of its weights.
        block_size: its context in tokens.
        losses: by the name of the prepared folder, of its validation set.
        validity: by temperature and constraint.
        prompts: the prepared folder whose test compositions were sampled.
        seed: of the samples.
    """

    name: str
    digest: str
    block_size: int
    losses: Mapping[str, FilesLoss]
    validity: Sequence[Validity]
    prompts: str
    seed: int


def measure(
    model: str,
    *,
    name: str,
    datasets: Sequence[Path],
    prompts: Path,
    count: int,
    seed: int,
    scratch: Path,
    stop: StopRequest,
) -> Measured:
    """Measure a model; samples that an earlier call has made are not made again.

    Args:
        model: a path or name.
        name: that it is given in tables.
        datasets: prepared folders whose validation sets are read.
        prompts: a prepared folder, of whose first test records the compositions are sampled, without space groups.
        count: how many of them.
        seed: of the samples.
        scratch: where samples are kept, a folder a model.
        stop: looked at between the pieces.

    Raises:
        CrystallmError: the model or the data cannot be read.
        StoppedError: a signal asked to end.
    """
    weights = read_model(model)
    digest = digest_of(weights)
    losses = losses_of(weights, datasets, stop=stop)
    folder = scratch / f"{digest}-{count}-{seed}"
    wanted = unique_ids(read_prompts(prompts)[:count])
    validity = tuple(_validities(load_model(model), wanted, seed=seed, folder=folder, stop=stop))
    return Measured(name, digest, weights.config.block_size, losses, validity, prompts.name, seed)


def losses_of(
    weights: Model, datasets: Sequence[Path], *, stop: StopRequest, block_size: int | None = None
) -> dict[str, FilesLoss]:
    """The loss on the validation set of each prepared folder, with a context of `block_size` or the model's own.

    Raises:
        CrystallmError: a folder cannot be read, or the context is shorter.
        StoppedError: a signal asked to end.
    """
    if block_size is not None:
        weights = crop_block_size(weights, block_size, place="the model")
    found = {}
    for dataset in datasets:
        found[dataset.name] = loss_of_files(weights, TokenStore.open(dataset, "val"))
        stop.check()
    return found


def digest_of(weights: Model) -> str:
    """A checksum of a model's shape and numbers, 12 hexadecimal digits."""
    digest = hashlib.sha256(repr(weights.config.block_size).encode())
    for name, values in sorted(named_arrays(weights.params, weights.config).items()):
        digest.update(f"{name} {values.shape}".encode())
        digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()[:12]


def _validities(
    model: CrystalModel, prompts: Sequence[Prompt], *, seed: int, folder: Path, stop: StopRequest
) -> Iterator[Validity]:
    with ValidatorPool() as pool:
        for constrain, temperature in product(CONSTRAINTS, TEMPERATURES):
            fitting = [prompt for prompt in prompts if _fits(model, prompt, constrain)]
            reasons = Counter({TOO_LONG: len(prompts) - len(fitting)})
            valid = 0
            if fitting:
                summary = sample_into(
                    ResultsFolder(folder / f"{constrain or 'none'}-{temperature}", resume=True),
                    model,
                    fitting,
                    GenerationRequest(
                        method=SamplingMethod(temperature=temperature, top_k=TOP_K),
                        num_samples=1,
                        seed=seed,
                        constrain=constrain,
                    ),
                    pool=pool,
                    stop=stop,
                )
                stop.check()
                valid = summary.totals.valid
                reasons.update(summary.totals.reasons)
            yield Validity(temperature, constrain, len(prompts), valid, dict((+reasons).most_common()))


def _fits(model: CrystalModel, prompt: Prompt, constrain: Level | None) -> bool:
    """Whether a sample can be asked for; what is held to nothing can always be begun."""
    if constrain is None:
        return True
    try:
        Automaton(constrain).plan(model.tokenizer.encode_cif(prompt.text), limit=model.config.block_size)
    except SamplingError:
        return False
    return True


def table(measured: Measured) -> str:
    """What was measured, for people."""
    lines = [f"{measured.name}: weights {measured.digest}, context {measured.block_size:,}"]
    lines += [
        f"  validation loss on {name}: {found.loss:.4f} nats a token over {found.targets:,} tokens of whole files"
        for name, found in measured.losses.items()
    ]
    lines += [
        f"  temperature {row.temperature}, constrain {row.constrain or 'none':<9} {row.valid:4d} of {row.samples}"
        f" valid ({row.share:6.1%}); {reasons_of(row)}"
        for row in measured.validity
    ]
    return "\n".join(lines)


def reasons_of(row: Validity) -> str:
    """What is wrong with those that are not valid."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in row.reasons.items())


def write_results(path: Path, measured: Measured) -> None:
    """Add a model to a file of results, under its name and the checksum of its weights.

    Raises:
        ModelError: the file is damaged, or cannot be written.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        models = results.get("models", {})
        models[f"{measured.name} {measured.digest}"] = _as_json(measured)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}: give another --out") from None
    with new_file(path, ModelError) as partial:
        partial.write_text(json.dumps({"models": models}, indent=2) + "\n", encoding="utf-8")


def _as_json(measured: Measured) -> dict[str, Any]:
    return {
        **asdict(measured),
        "losses": {name: found._asdict() for name, found in measured.losses.items()},
        "validity": [{**row._asdict(), "share": round(row.share, 4)} for row in measured.validity],
        "top_k": TOP_K,
        "versions": {name: version(name) for name in ("jax", "pymatgen", "spglib", "numpy")},
    }
