"""Where a model of some name lies on this machine: fetched, and converted once, where it does not."""

import tempfile
from pathlib import Path

from crystallm_jax.artifacts import cache_folder, checkpoint_of, converted_folder, fetch, model_archives
from crystallm_jax.convert.card import ModelCard
from crystallm_jax.convert.folder import is_folder, write_folder
from crystallm_jax.convert.hub import fetch_hub
from crystallm_jax.convert.published import read_published
from crystallm_jax.convert.weights import Weights
from crystallm_jax.errors import ModelError

DEFAULT_NAME = "default"
"""The name of the model in the package."""
DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / DEFAULT_NAME
HUB_PREFIX = "hf:"
_ARCHIVE_ENDING = ".tar.gz"


def is_name(text: str) -> bool:
    """Whether a text names a model rather than a place: `default`, `hf:OWNER/NAME`, a published model."""
    return (
        text == DEFAULT_NAME
        or text.startswith(HUB_PREFIX)
        or (text in model_archives() and not Path(text).exists())
    )


def locate(path_or_name: str | Path) -> Path:
    """Where a model lies; one that is named is downloaded, and a published one converted, the first time.

    Raises:
        CrystallmError: it cannot be had.
    """
    text = str(path_or_name)
    if not is_name(text):
        return Path(path_or_name)
    if text == DEFAULT_NAME:
        return DEFAULT_MODEL
    if text.startswith(HUB_PREFIX):
        return fetch_hub(text.removeprefix(HUB_PREFIX))
    return _published_model(text)


def _published_model(name: str) -> Path:
    """The model folder of a published model."""
    folder = converted_folder(name)
    if is_folder(folder):
        return folder
    weights = read_archive(fetch(name))
    card = ModelCard(
        license="cc-by-4.0",
        data=f"{name} of CrystaLLM (L. M. Antunes, K. T. Butler, R. Grau-Crespo, Nat. Commun. 15, 10570, 2024),"
        " https://zenodo.org/records/10642388, converted",
    )
    # Two processes that convert it at once write a folder each; the first to end is kept.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
        write_folder(Path(temporary) / name, weights, card=card)
        try:
            (Path(temporary) / name).replace(folder)
        except OSError as error:
            if not is_folder(folder):
                raise ModelError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder


def read_archive(archive: Path) -> Weights:
    """Read a published model's archive: the `ckpt.pt` in it.

    Raises:
        CrystallmError: there is none in it, or it is damaged.
    """
    # Some gigabytes, for which the system's folder of temporary files, often in memory, may be too small.
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        return read_published(checkpoint_of(archive, Path(temporary) / "ckpt.pt"))
