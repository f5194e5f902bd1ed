"""`crystallm download`: the published models and data by name."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from crystallm_jax.artifacts.cache import artifact_folder
from crystallm_jax.artifacts.fetching import Kept, fetch, kept
from crystallm_jax.artifacts.source import Source, default_source, without_password
from crystallm_jax.artifacts.table import KINDS, LICENCE, Artifact, find, size_text
from crystallm_jax.artifacts.unpacking import check_free, unpack
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.files import digest_of, new_file, write_errors


def run(arguments: argparse.Namespace) -> int:
    """Download, or list; returns the exit code.

    Raises:
        ConfigError: flags that do not go together, or a mirror that is no URL.
        DataError: a file that is not known, cannot be had, or cannot be put where it is wanted.
    """
    _check(arguments)
    source = default_source()
    if arguments.list:
        sys.stdout.write(_as_json(source) if arguments.json else _as_table(source))
        return 0
    _download(arguments, source)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.list and (arguments.names or arguments.out or arguments.unpack):
        raise ConfigError(
            "--list shows what there is and takes neither NAMEs nor --out nor --unpack: leave them out"
        )
    if arguments.json and not arguments.list:
        raise ConfigError("--json says how --list shows its table: add --list")
    if not arguments.list and not arguments.names:
        raise ConfigError("no NAME given: name files to download, or give --list to see them")


def _download(arguments: argparse.Namespace, source: Source) -> None:
    # What cannot be done is said before anything is downloaded.
    wanted = list(dict.fromkeys(find(name, source.artifacts) for name in arguments.names))
    places = {artifact: _place(artifact, arguments) for artifact in wanted}
    print(f"licence: {LICENCE}", file=sys.stderr)  # noqa: T201
    for artifact, place in places.items():
        path = fetch(artifact.name, source)
        if place is not None and arguments.unpack:
            _unpack(path, place)
        elif place is not None:
            _put(path, place, artifact)
        sys.stdout.write(f"{place or path}\n")
        sys.stdout.flush()


def _place(artifact: Artifact, arguments: argparse.Namespace) -> Path | None:
    """Where a file, or what is in it, is to lie; None for the cache."""
    folder: Path = arguments.out or Path()
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: is a file: give a folder")
    if not arguments.unpack:
        return folder / artifact.name if arguments.out else None
    if not artifact.is_archive:
        raise DataError(f"{artifact.name}: is no archive: leave out --unpack")
    check_free(folder / artifact.stem)
    return folder / artifact.stem


def _unpack(path: Path, folder: Path) -> None:
    with tqdm(
        total=path.stat().st_size, unit="B", unit_scale=True, desc=f"unpack {folder.name}", disable=None
    ) as bar:
        unpack(path, folder, on_bytes=bar.update)


def _put(path: Path, place: Path, artifact: Artifact) -> None:
    """Put a file of the cache to another place, where nothing else may lie."""
    with write_errors(place, DataError, mend="; give another --out"):
        if place.exists():
            if place.is_file() and digest_of(place, "md5") == artifact.md5:
                return
            raise DataError(
                f"{place}: is there already and is another file: remove it, or give another --out"
            )
        with new_file(place) as partial:
            try:
                partial.hardlink_to(path)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, partial)


def _as_table(source: Source) -> str:
    width = max(len(artifact.name) for artifact in source.artifacts)
    lines = []
    for kind, about in KINDS.items():
        lines.append(about)
        for artifact, held in _held(source.artifacts):
            if artifact.kind == kind:
                row = f"  {artifact.name:<{width}}  {size_text(artifact.size):>8}  {_state(artifact, held)}"
                lines.append(row.rstrip())
        lines.append("")
    lines += [
        f"from     {without_password(source.url)}",
        f"cache    {artifact_folder()}",
        f"licence  {LICENCE}",
    ]
    return "\n".join(lines) + "\n"


def _held(artifacts: Sequence[Artifact]) -> list[tuple[Artifact, Kept]]:
    return [(artifact, kept(artifact)) for artifact in artifacts]


def _state(artifact: Artifact, held: Kept) -> str:
    if held.state == "partial":
        return f"{min(100 * held.size // artifact.size, 99)} % of it in the cache"
    return {"checked": "in the cache", "unchecked": "in the cache, not checked yet"}.get(held.state, "")


def _as_json(source: Source) -> str:
    rows = [
        {
            "name": artifact.stem,
            "file": artifact.name,
            "kind": artifact.kind,
            "bytes": artifact.size,
            "md5": artifact.md5,
            "url": without_password(source.url_of(artifact)),
            "cache": held.state,
            "path": str(artifact_folder() / artifact.name)
            if held.state in {"checked", "unchecked"}
            else None,
        }
        for artifact, held in _held(source.artifacts)
    ]
    return json.dumps(rows, indent=2) + "\n"
