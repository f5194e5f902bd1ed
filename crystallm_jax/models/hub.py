"""Models from and to the Hugging Face hub, through `huggingface_hub`: fetched once, then read from its cache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from crystallm_jax.errors import ModelError

# Of both kinds of folders, ours and Hugging Face's. `*` would reach into folders: checkpoints of a training, say.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocabulary.json",
    "config.yaml",
    "optimizer.safetensors",
    "training.json",
    "params/*",
    "README.md",
    "MODEL_CARD.md",
    "LICENSE",
)
# Read by the reader that executes nothing, and fetched where there is nothing else.
_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>\S+))?", re.ASCII)
_FORBIDDEN = (401, 403)


class _Place(NamedTuple):
    repository: str
    revision: str | None


def fetch_hub(name: str) -> Path:
    """Fetch a model, a folder of ours or of Hugging Face's, into the hub's cache; what is there is not fetched again.

    No code is fetched, and pickled weights only where there are no others. What is cached is found without a network
    too, with `HF_HUB_OFFLINE=1` or where the hub cannot be reached.

    Args:
        name: `owner/name`, with `@revision` for a branch, tag or commit other than the main branch's newest.

    Returns:
        The folder, in the cache: not to be changed.

    Raises:
        ModelError: there is no such model, it may not be read, or the hub cannot be reached and it is not cached.
    """
    place = _parsed(name)
    hub = _library()
    with _told(hub, f"hf:{name}"):
        folder = _snapshot(hub, place, MODEL_FILES)
        if not _has_weights(folder):
            folder = _snapshot(hub, place, (*MODEL_FILES, *_PICKLES))
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ModelError(f"hf:{name}: there is no model in it: no {', '.join(MODEL_FILES[:3])} and the like")
    return folder


def push_hub(
    folder: Path, name: str, *, private: bool = True, message: str = "Add a model of crystallm-jax"
) -> str:
    """Put a model folder, ours or Hugging Face's, into a repository of the hub, which is made if need be.

    Only files of models are sent. The token is the one that `hf auth login` left, or `HF_TOKEN`.

    Args:
        folder: what is sent.
        name: `owner/name` of the repository.
        private: whether only its owner may see it; a public one is never taken for it.
        message: of the commit.

    Returns:
        Where it is to be seen.

    Raises:
        ModelError: no model there, no token, or one that may not write there; or the hub cannot be reached.
    """
    place = _parsed(name)
    if place.revision is not None:
        raise ModelError(f"{name}: models are pushed to the main branch: leave @{place.revision} out")
    if not _has_weights(folder):
        raise ModelError(f"{folder}: no model folder to push: it has no model.safetensors and no params/")
    hub = _library()
    with _told(hub, name):
        if hub.get_token() is None:
            raise ModelError(f"{name}: no token to push with: run `hf auth login`, or set HF_TOKEN")
        api = hub.HfApi()
        url = str(api.create_repo(name, private=private, exist_ok=True))
        if private and api.repo_info(name).private is False:
            raise ModelError(f"{name}: is there already and public: push it as public, or give another name")
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, allow_patterns=list(MODEL_FILES)
        )
    return url


def _parsed(name: str) -> _Place:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ModelError(f"{name!r} is no name of a model on the hub: give owner/name or owner/name@revision")
    return _Place(match["repository"], match["revision"])


def _library() -> ModuleType:
    try:
        import huggingface_hub  # noqa: PLC0415  an extra, and slow to load
        import huggingface_hub.errors  # noqa: PLC0415
    except ImportError:
        raise ModelError(
            "the hub is reached with the package huggingface_hub, which is not installed:"
            " pip install 'crystallm-jax[hub]'"
        ) from None
    return huggingface_hub


def _snapshot(hub: ModuleType, place: _Place, patterns: tuple[str, ...]) -> Path:
    return Path(
        hub.snapshot_download(
            place.repository,
            revision=place.revision,
            allow_patterns=list(patterns),
            library_name="crystallm-jax",
        )
    )


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) or (folder / "params").is_dir()


@contextmanager
def _told(hub: ModuleType, name: str) -> Iterator[None]:
    """What the library raises, in one line.

    Raises:
        ModelError: for everything that it raises.
    """
    errors = hub.errors
    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(
            f"{name}: access must be granted first: ask for it on its page, then run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{name}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{name}: no such repository on the hub, or a private one: check the name, or run `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ModelError(f"{name}: {reason}, and the model is not in the cache, or not all of it") from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(f"{name}: HF_HUB_OFFLINE is set: the hub is not asked") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in _FORBIDDEN:
            raise ModelError(
                f"{name}: the token may not do that (HTTP {status}): give one that may"
            ) from None
        raise ModelError(f"{name}: the hub answered: {_line(error)}") from None
    except (errors.HTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: the hub cannot be used: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
