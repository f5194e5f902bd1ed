"""A published file by name, from the cache or downloaded into it: whole and checked, or not there."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from crystallm_jax.artifacts.cache import artifact_folder
from crystallm_jax.artifacts.source import Source, default_source, without_password
from crystallm_jax.artifacts.table import Artifact, find, size_text
from crystallm_jax.errors import DataError
from crystallm_jax.files import digest_of, holder_of, lock, new_file, sign

PARTIAL = ".partial"

logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """What the cache holds of a file: bytes, and whether they are all there and were checked."""

    state: Literal["checked", "unchecked", "partial", "none"]
    size: int


def fetch(name: str, source: Source | None = None, *, folder: Path | None = None) -> Path:
    """Get a published file, from the cache where it is there; returns where it lies.

    A download that was broken off is continued. A file that was put into the cache by hand is taken if its MD5 agrees.

    Args:
        name: the file's name, with or without its ending.
        source: where from; None for `default_source()`.
        folder: where it is kept; None for `artifact_folder()`.

    Raises:
        DataError: no such name, it cannot be had, or what was had is not the published file.
        ConfigError: `$CRYSTALLM_MIRROR` is no URL.
    """
    source = default_source() if source is None else source
    folder = artifact_folder() if folder is None else folder
    artifact = find(name, source.artifacts)
    path = folder / artifact.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_whole(path, artifact):
            return path
        with _sole_download(folder, artifact):
            if not is_whole(path, artifact):
                if path.exists():
                    logger.warning("%s is not the published file (its MD5 is another): it is replaced", path)
                _download(artifact, source, path)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}; set CRYSTALLM_CACHE to a folder that can be used"
        ) from None
    return path


def is_whole(path: Path, artifact: Artifact) -> bool:
    """Whether the file is there with the published MD5; one that has not changed since it was checked is not read.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return False
    if _is_remembered(path, artifact):
        return True
    if not artifact.may_have(path.stat().st_size) or digest_of(path, "md5") != artifact.md5:
        return False
    _remember(path, artifact)
    return True


def kept(artifact: Artifact, folder: Path | None = None) -> Kept:
    """What the cache holds of a file, without reading it."""
    path = (artifact_folder() if folder is None else folder) / artifact.name
    partial = _partial(path)
    if path.is_file():
        return Kept("checked" if _is_remembered(path, artifact) else "unchecked", path.stat().st_size)
    return Kept("partial", partial.stat().st_size) if partial.is_file() else Kept("none", 0)


def _download(artifact: Artifact, source: Source, path: Path) -> None:
    """Download, check, and only then give the file its name; what was put together from pieces has a second chance."""
    from crystallm_jax.artifacts.transfer import download  # noqa: PLC0415  requests, where something is downloaded

    partial = _partial(path)
    url = without_password(source.url_of(artifact))
    logger.info("downloading %s (%s) from %s", artifact.name, size_text(artifact.size), url)
    for again in (True, False):
        in_pieces = download(artifact, source, partial)
        found = digest_of(partial, "md5")
        if found == artifact.md5:
            break
        partial.unlink()
        if not (in_pieces and again):
            raise DataError(
                f"{url}: what came has the MD5 {found}, not {artifact.md5}: damaged on its way, or another file; "
                "it was removed: try again, or set CRYSTALLM_MIRROR to another place"
            )
        logger.warning(
            "%s: its pieces do not fit together (MD5 %s): downloading it anew", artifact.name, found
        )
    partial.replace(path)
    _remember(path, artifact)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _memory(path: Path) -> Path:
    return path.with_name(f".{path.name}.checked")


def _stamp(path: Path, artifact: Artifact) -> dict[str, str | int]:
    stat = path.stat()
    return {"md5": artifact.md5, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_remembered(path: Path, artifact: Artifact) -> bool:
    try:
        return json.loads(_memory(path).read_text(encoding="utf-8")) == _stamp(path, artifact)
    except (OSError, ValueError):
        return False  # never checked, or what was noted cannot be read: it is checked again


def _remember(path: Path, artifact: Artifact) -> None:
    # In a cache that is not ours to write to, it is checked each time.
    with contextlib.suppress(OSError), new_file(_memory(path)) as partial:
        partial.write_text(json.dumps(_stamp(path, artifact)), encoding="utf-8")


@contextlib.contextmanager
def _sole_download(folder: Path, artifact: Artifact) -> Iterator[None]:
    """Let one process at a time download a file, the others wait; where there are no locks, nobody waits."""
    with (folder / f".{artifact.name}.lock").open("a+") as file:
        try:
            if not lock(file):
                logger.info("waiting for %s: %s downloads it", artifact.name, holder_of(file))
                lock(file, wait=True)
        except OSError:
            logger.warning("%s: this folder has no locks; do not download a file twice at once", folder)
        sign(file)
        yield
