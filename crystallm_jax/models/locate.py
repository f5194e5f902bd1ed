"""Where a model of some name lies on this machine: fetched, and converted once, where it does not."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from crystallm_jax.artifacts import cache_folder, checkpoint_of, converted_folder, fetch, model_archives
from crystallm_jax.artifacts.table import RECORD
from crystallm_jax.errors import ModelError
from crystallm_jax.files import scratch_folder
from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.detect import kind_of
from crystallm_jax.models.hub import fetch_hub
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import WEIGHTS_FILE, is_folder, write_folder
from crystallm_jax.models.published import read_published

DEFAULT_NAME = "default"
"""The name of the model in the package."""
DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / DEFAULT_NAME
HUB_PREFIX = "hf:"


def is_name(text: str) -> bool:
    """Whether a text names a model rather than a place: `default`, `hf:OWNER/NAME`, a published model."""
    return (
        text == DEFAULT_NAME
        or text.startswith(HUB_PREFIX)
        or (text in model_archives() and not Path(text).exists())
    )


def bare_name(text: str) -> str:
    """The name of a model as it is; of a path its last part: where it lay is of no use elsewhere."""
    return text if is_name(text) else Path(text).name


def locate(path_or_name: str | Path) -> Path:
    """Where a model lies; one that is named is downloaded, and a published one converted, the first time.

    Of parameters that lie in a model folder it is the folder.

    Raises:
        CrystallmError: it cannot be had.
    """
    text = str(path_or_name)
    if not is_name(text):
        return _parameters_folder(Path(path_or_name))
    if text == DEFAULT_NAME:
        return DEFAULT_MODEL
    if text.startswith(HUB_PREFIX):
        return fetch_hub(text.removeprefix(HUB_PREFIX))
    return _published_model(text)


def _parameters_folder(path: Path) -> Path:
    within = path.name == WEIGHTS_FILE and kind_of(path) and kind_of(path.parent) in ("folder", "huggingface")
    return path.parent if within else path


def _published_model(name: str) -> Path:
    """The model folder of a published model."""
    folder = converted_folder(name)
    if is_folder(folder):
        return folder
    weights = read_archive(fetch(name))
    card = ModelCard(
        license="cc-by-4.0",
        data=f"{name} of CrystaLLM (L. M. Antunes, K. T. Butler, R. Grau-Crespo, Nat. Commun. 15, 10570, 2024),"
        f" {RECORD}, converted",
    )
    try:
        write_folder(folder, weights, card=card)
    except ModelError:
        # Two processes that convert it at once write a folder each; the first to end is kept.
        if not is_folder(folder):
            raise
    return folder


def read_archive(archive: Path, read: Callable[[Path], Model] = read_published) -> Model:
    """Read a published model's archive: the `ckpt.pt` in it.

    Args:
        archive: the file.
        read: how the checkpoint is read: without the optimiser's moments, or with them.

    Raises:
        CrystallmError: there is none in it, or it is damaged.
    """
    # Some gigabytes, for which the system's folder of temporary files, often in memory, may be too small.
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(cache_folder() / "unpacked"))
        except OSError as error:
            raise ModelError(
                f"{error.filename or cache_folder()}: cannot be written: {error.strerror}; set CRYSTALLM_CACHE to a"
                " folder that can be used"
            ) from None
        return read(checkpoint_of(archive, folder / "ckpt.pt"))
