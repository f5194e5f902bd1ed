"""`crystallm embeddings`: the vectors of a model's tokens as files and pictures, and which tokens are alike."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from crystallm_jax.cli.flags.embeddings import DEFAULT_OUT, KINDS
from crystallm_jax.embeddings import find_token, kind_of, nearest, vectors
from crystallm_jax.embeddings.measures import measures, sentences
from crystallm_jax.embeddings.neighbours import Neighbour
from crystallm_jax.embeddings.page import page_of
from crystallm_jax.embeddings.plot import plot_table
from crystallm_jax.embeddings.projection import Projection, project
from crystallm_jax.embeddings.vectors import EmbeddingTable, Kind, drawn_kind, file_name, shown, to_csv
from crystallm_jax.errors import ConfigError, DataError
from crystallm_jax.files import new_file

# Of files, that say what they are, not whose.
_PLAIN_NAMES = {"ckpt", "model"}


def run(arguments: argparse.Namespace) -> int:
    """Write and print; returns the exit code.

    Raises:
        CrystallmError: the model or file cannot be read, a token is unknown, or the folder cannot be written.
    """
    name, tables = _tables(arguments)
    found = [_neighbours(tables, text, arguments) for text in arguments.neighbours]
    drawn: list[_Drawn] = []
    if arguments.out is not None or not arguments.neighbours:
        out = Path(arguments.out or DEFAULT_OUT)
        kinds = [kind for kind in tables if kind in (arguments.kind or KINDS)]
        drawn = [_write(name, tables[kind], out, arguments) for kind in kinds]
    if arguments.json:
        report = {
            "model": name,
            "source": arguments.model,
            "projection": arguments.projection,
            "kinds": {part.table.kind: part.report() for part in drawn},
            "neighbours": [part._asdict() for part in found],
        }
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        texts = [*(part.text() for part in drawn), *(part.text() for part in found)]
        sys.stdout.write("\n".join(texts))
    return 0


class _Drawn(NamedTuple):
    """A kind that was drawn."""

    table: EmbeddingTable
    projection: Projection
    measures: Mapping[str, float]
    files: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        points = self.projection.points.tolist()
        return {
            "tokens": len(self.table.tokens),
            "width": self.table.vectors.shape[1],
            "files": self.files,
            "variance_shares": self.projection.shares,
            "measures": self.measures,
            "points": dict(zip(self.table.tokens, points, strict=True)),
        }

    def text(self) -> str:
        tokens, width = self.table.vectors.shape
        head = f"{self.table.kind}: {tokens} vectors of {width} numbers"
        lines = [head, *(f"  {sentence}" for sentence in sentences(self.measures))]
        return "\n".join([*lines, *(f"  {file}" for file in self.files), ""])


class _Near(NamedTuple):
    """The neighbours of a token."""

    token: str
    among: str
    neighbours: list[Neighbour]

    def text(self) -> str:
        rows = [(shown(token).removesuffix("_sg"), cosine) for token, cosine in self.neighbours]
        width = max((len(token) for token, _ in rows), default=0)
        lines = [f"{shown(self.token).removesuffix('_sg')}: nearest by cosine among {self.among}"]
        return "\n".join([*lines, *(f"  {token:<{width}}  {cosine:7.4f}" for token, cosine in rows), ""])


def _tables(arguments: argparse.Namespace) -> tuple[str, dict[Kind, EmbeddingTable]]:
    """The model's name, and its tables by kind; of a file of vectors, its one.

    Raises:
        CrystallmError: it cannot be read, or does not hold what is wanted.
    """
    model = arguments.model
    if vectors.is_vector_file(model):
        table = vectors.read_csv(model)
        other = next((kind for kind in arguments.kind or () if kind != table.kind), None)
        if other is not None:
            raise ConfigError(
                f"--kind {other}: {model} holds vectors of the kind {table.kind}: leave --kind out"
            )
        if arguments.among == "all":
            raise ConfigError(
                f"--among all: {model} holds one kind of tokens: give a model, not a file of vectors"
            )
        return vectors.name_of_file(model), {table.kind: table}
    from crystallm_jax.models.kinds import read_model  # noqa: PLC0415

    weights = read_model(model)
    kinds: tuple[Kind, ...] = get_args(vectors.Kind)
    return _name_of(model), {kind: vectors.vectors_of(weights, kind, place=model) for kind in kinds}


def _name_of(model: str) -> str:
    """What a model is called: its folder or file; a checkpoint of a run, after the run and the step."""
    path = Path(model)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return f"{path.resolve().parents[1].name}-{path.name}"
    if path.is_file():
        return path.resolve().parent.name if path.stem in _PLAIN_NAMES else path.stem
    return path.name if not path.exists() else path.resolve().name


def _neighbours(tables: Mapping[Kind, EmbeddingTable], text: str, arguments: argparse.Namespace) -> _Near:
    """Look a token's neighbours up.

    Raises:
        DataError: it is no token, or its vector is not there.
    """
    token = find_token(text)
    kind: Kind = "all" if arguments.among == "all" else kind_of(token)
    if kind not in tables:
        known = ", ".join(tables)
        raise DataError(
            f"--neighbours {text}: {arguments.model} holds vectors of the kind {known}, not {kind}"
        )
    table = tables[kind]
    among = (
        f"the {len(table.tokens)} tokens" if kind == "all" else f"the {len(table.tokens)} of its kind, {kind}"
    )
    return _Near(token, among, nearest(table, token, arguments.count))


def _write(name: str, table: EmbeddingTable, out: Path, arguments: argparse.Namespace) -> _Drawn:
    """Write the vectors, the picture and the page of a kind; each appears under its name when it is complete.

    Raises:
        DataError: the folder or a file in it cannot be written.
    """
    kind = drawn_kind(table)
    projection, figures = project(table.vectors, arguments.projection), measures(table)
    page = page_of(table, projection, name=name, measures=sentences(figures))
    writers: dict[str, Callable[[Path], object]] = {
        file_name(name, kind): lambda path: path.write_text(to_csv(table), encoding="utf-8"),
        f"{name}.{kind}.png": lambda path: plot_table(table, projection, path, name=name),
        f"{name}.{kind}.html": lambda path: path.write_text(page, encoding="utf-8"),
    }
    for file, write in writers.items():
        # The file that was read stays as it is.
        if (out / file).resolve() != Path(arguments.model).resolve():
            _appear(out / file, write)
    return _Drawn(table, projection, figures, tuple(str(out / file) for file in writers))


def _appear(path: Path, write: "Callable[[Path], object]") -> None:
    with new_file(path, DataError, mend=": give another --out") as partial:
        write(partial)
