"""Vectors of tokens: the published files, planes, neighbours, pictures, and the verb."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from crystallm_jax.cif.vocabulary import SPACEGROUPS, TOKENS
from crystallm_jax.cli import main
from crystallm_jax.embeddings import (
    EmbeddingTable,
    find_token,
    kind_of,
    measures,
    nearest,
    pca,
    project,
    read_csv,
    to_csv,
    tokens_of,
    tsne,
    vectors_of,
)
from crystallm_jax.embeddings.classes import COLOURS, crystal_system, facts_of, periodic_place
from crystallm_jax.embeddings.labels import spread
from crystallm_jax.embeddings.neighbours import agreement, spearman
from crystallm_jax.embeddings.page import page_of, readable
from crystallm_jax.embeddings.plot import plot_table, typeset
from crystallm_jax.embeddings.vectors import DRAWN_KINDS, file_name, name_of_file
from crystallm_jax.errors import ConfigError, CrystallmError, DataError, ModelError
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import write_folder

PUBLISHED = {"atom": "atom_vectors", "digit": "number_vectors", "spacegroup": "spacegroup_vectors"}
# Numbers of float32 as the published files write them.
FILE = """element,0,1
H,0.10000000149011612,-2.499999936844688e-05
He,-1.5,3.0
Li,0.0,0.3333333432674408
"""
SHAPE = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=len(TOKENS))


def _weights(config: ModelConfig = SHAPE) -> Model:
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return Model(config, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes))


def _table(kind: Any, width: int = 6) -> EmbeddingTable:
    tokens = tokens_of(kind)
    return EmbeddingTable(kind, tokens, np.random.default_rng(1).normal(size=(len(tokens), width)))


def _line_of(caught: pytest.ExceptionInfo[CrystallmError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_folder(path, _weights())
    return path


def test_a_file_is_written_byte_for_byte_as_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.atom_vectors.csv"
    path.write_bytes(FILE.encode())
    table = read_csv(path)
    assert (table.kind, table.tokens) == ("atom", ("H", "He", "Li"))
    assert table.vectors[0, 0] == np.float32(0.1)
    assert to_csv(table) == FILE
    assert to_csv(EmbeddingTable("atom", table.tokens, table.vectors.astype(np.float32))) == FILE


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_published_files_are_written_byte_for_byte(kind: Any, crystals: Path) -> None:
    path = crystals / "embeddings" / f"crystallm_v1_small.{PUBLISHED[kind]}.csv.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    table = read_csv(path)
    assert (table.kind, table.tokens) == (kind, tokens_of(kind))
    assert to_csv(table).encode() == gzip.decompress(path.read_bytes())
    assert (name_of_file(path), file_name("x", kind)) == ("crystallm_v1_small", f"x.{PUBLISHED[kind]}.csv")
    figures = measures(table)
    if kind == "digit":
        assert figures["component_1_order"] == 1
    else:
        assert all(
            value > 3 * figures[f"{name}_by_chance"]
            for name, value in figures.items()
            if f"{name}_by_chance" in figures
        )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", [":1:", "header"]),
        (b"element,1,2\nH,1,2\n", [":1:", "header"]),
        (b"element,0\nH,1\nHe,1\nLi,1\n", [":1:", "2 or more"]),
        (b"element,0,1\nH,1,2\nXx,1,2\n", [":3:", "'Xx'"]),
        (b"element,0,1\nFm-3m,1,2\n", [":2:", "Fm-3m_sg"]),
        (b"element,0,1\nH,1,2\nH,1,2\n", [":3:", "second time"]),
        (b"element,0,1\nH,1,2,3\n", [":2:", "3 numbers", "2"]),
        (b"element,0,1\nH,1,two\n", [":2:", "'two'"]),
        (b"element,0,1\nH,1,nan\n", [":2:", "nan", "finite"]),
        (b"element,0,1\nH,1,2\nHe,1,2\n", ["2 tokens", "3 or more"]),
        (b"element,0,1\nH,1,2\n7,1,2\nHe,1,2\n", ["7", "one kind"]),
        (b"element,0,1\ndata_,1,2\nloop_,1,2\nx,1,2\n", ["data_"]),
        (b"\xff\xfe", ["UTF-8"]),
    ],
)
def test_files_of_something_else_are_refused_in_one_line(
    content: bytes, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "vectors.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_csv(path)
    assert all(part in _line_of(caught) for part in [str(path), *parts])


def test_damaged_missing_and_endless_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vectors.csv.gz"
    whole = gzip.compress(FILE.encode() * 50, mtime=0)
    monkeypatch.setattr("crystallm_jax.embeddings.vectors._LONGEST", len(FILE) * 50 - 1)
    for content, part in ((b"no gzip", "cannot be read"), (whole[:-20], "cannot be read"), (whole, "MiB")):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_csv(path)
        assert part in _line_of(caught)
    with pytest.raises(DataError, match="No such file"):
        read_csv(tmp_path / "none.csv")


def test_every_token_is_of_one_kind() -> None:
    counts = Counter(map(kind_of, TOKENS))
    assert counts == {"atom": 89, "digit": 10, "spacegroup": 227, "keyword": 31, "symbol": 13, "all": 1}
    assert tokens_of("atom")[:3] == ("H", "He", "Li")
    assert tokens_of("all") == TOKENS


@pytest.mark.parametrize(
    ("text", "token"),
    [
        *(("Na", "Na"), ("7", "7"), ("data_", "data_"), ("<unk>", "<unk>"), ("\\n", "\n")),
        *(("Fm-3m", "Fm-3m_sg"), ("Fm-3m_sg", "Fm-3m_sg"), ("225", "Fm-3m_sg")),
    ],
)
def test_tokens_are_found_by_what_people_write(text: str, token: str) -> None:
    assert find_token(text) == token


def test_what_is_no_token_is_refused_with_what_is_near() -> None:
    for text, hint in (("na", "Na"), ("data", "data_"), ("?", "write one")):
        with pytest.raises(DataError) as caught:
            find_token(text)
        assert hint in _line_of(caught)


def test_rows_of_a_model_stand_in_the_published_order() -> None:
    weights = _weights()
    embedding = weights.params["wte"]["embedding"]
    table = vectors_of(weights, "atom")
    assert table.tokens == tokens_of("atom")
    np.testing.assert_array_equal(table.vectors[10], embedding[TOKENS.index("Na")])
    np.testing.assert_array_equal(vectors_of(weights, "all").vectors, embedding)


def test_models_of_other_vocabularies_and_broken_ones_are_refused() -> None:
    short = SimpleNamespace(params={"wte": {"embedding": np.ones((11, 4))}})
    with pytest.raises(ModelError) as caught:
        vectors_of(short, "atom", place="that")
    assert "that: its vocabulary has 11" in _line_of(caught)
    broken = np.ones((len(TOKENS), 4), np.float32)
    broken[TOKENS.index("\n"), 2] = np.inf
    with pytest.raises(ModelError, match=r"vector of \\n"):
        vectors_of(SimpleNamespace(params={"wte": {"embedding": broken}}), "symbol")


def test_principal_components_are_those_of_the_covariance() -> None:
    vectors = np.random.default_rng(2).normal(size=(12, 5)) * [3, 1, 0.5, 0.2, 0.1]
    values, axes = np.linalg.eigh(np.cov(vectors.T))
    found = pca(vectors)
    expected = (vectors - vectors.mean(axis=0)) @ axes[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found.points), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(found.shares, values[::-1][:2] / values.sum())
    loadings = np.linalg.lstsq(vectors - vectors.mean(axis=0), found.points, rcond=None)[0].T
    assert all(row[np.abs(row).argmax()] > 0 for row in loadings)
    np.testing.assert_allclose(pca(vectors[::-1]).points[::-1], found.points, atol=1e-9)


def test_vectors_that_are_all_the_same_are_one_point() -> None:
    found = pca(np.ones((4, 3)))
    np.testing.assert_allclose(found.points, 0, atol=1e-12)
    assert np.isfinite(tsne(np.ones((4, 3))).points).all()


def test_tsne_keeps_neighbourhoods_and_gives_the_same_points_again() -> None:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(3, 20))
    vectors = np.concatenate([centre + 0.3 * rng.normal(size=(8, 20)) for centre in centres])
    found = tsne(vectors)
    np.testing.assert_array_equal(found.points, tsne(vectors).points)
    distances = np.linalg.norm(found.points[:, None] - found.points, axis=-1) + np.diag([np.inf] * 24)
    assert (distances.argmin(axis=1) // 8 == np.arange(24) // 8).all()


def test_without_scikit_learn_tsne_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ConfigError) as caught:
        project(np.eye(4), "tsne")
    assert "pip install 'crystallm-jax[embeddings]'" in _line_of(caught)
    assert project(np.eye(4), "pca").method == "principal components"


def test_neighbours_are_those_of_the_largest_cosine_and_not_the_token_itself() -> None:
    vectors = np.array([[1.0, 0], [2, 2], [0, 5], [-1, 0], [0, 0]])
    table = EmbeddingTable("digit", ("0", "1", "2", "3", "4"), vectors)
    found = nearest(table, "0")
    assert [token for token, _ in found] == ["1", "2", "4", "3"]
    np.testing.assert_allclose([cosine for _, cosine in found], [0.5**0.5, 0, 0, -1])
    assert nearest(table, "2", 1)[0].token == "1"
    with pytest.raises(DataError, match="not among these 5"):
        nearest(table, "9")


def test_agreement_is_a_share_beside_that_by_chance() -> None:
    vectors = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    table = EmbeddingTable("digit", ("0", "1", "2", "3"), vectors)
    assert agreement(table, "aabb") == (1, pytest.approx(1 / 3))
    assert agreement(table, "abab") == (0, pytest.approx(1 / 3))
    assert spearman(np.array([1, 2, 2, 9]), np.array([1, 5, 5, 6])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 1, 2])) == pytest.approx(-0.5)
    assert spearman(np.ones(3), np.arange(3)) == 0


def test_digits_on_a_line_are_in_order() -> None:
    line = np.stack([np.cos(np.arange(10) / 9), np.sin(np.arange(10) / 9)], axis=1)
    assert measures(EmbeddingTable("digit", tokens_of("digit"), line)) == {
        "component_1_order": pytest.approx(1),
        "distance_order": pytest.approx(1, abs=0.02),
    }


def test_elements_stand_where_pymatgen_has_them() -> None:
    from pymatgen.core import Element

    for symbol in tokens_of("atom"):
        element = Element(symbol)
        place = periodic_place(element.Z)
        # Its block of helium is that of its column.
        assert (place.period, place.block) == (element.row, "s" if symbol == "He" else element.block), symbol
        if place.block != "f":
            assert place.group == element.group, symbol
        name = dict(facts_of(symbol, "atom").facts)["name"]
        assert name[:3] == element.long_name.lower()[:3] or symbol == "Cs"


def test_space_groups_are_of_the_system_of_their_number() -> None:
    edges = {"P-1": "triclinic", "P2": "monoclinic", "P222": "orthorhombic", "I4_1/acd": "tetragonal"}
    edges |= {"P3": "trigonal", "R-3c": "trigonal", "P6_1": "hexagonal", "P23": "cubic", "Ia-3d": "cubic"}
    assert {symbol: crystal_system(SPACEGROUPS[symbol]) for symbol in edges} == edges
    assert {facts_of(token, "spacegroup").class_name for token in tokens_of("spacegroup")} <= {*COLOURS}


def test_symbols_are_set_with_bars_and_small_numbers() -> None:
    assert typeset("P-42_1m") == r"$\mathregular{P\bar{4}2_{1}m}$"
    assert (typeset("Pnma"), readable("P6_3/mmc"), readable("Fd-3m")) == ("Pnma", "P6₃/mmc", "Fd3\u0304m")


def test_labels_lie_apart_from_each_other_and_from_the_points() -> None:
    points = np.random.default_rng(5).uniform(10, 190, size=(30, 2))
    sizes = np.full((30, 2), (14.0, 8.0))
    found = spread(points, sizes, radius=2, box=np.array([[0.0, 0], [200, 200]]))
    assert found.legible.all()
    apart = np.abs(found.centres[:, None] - found.centres) + np.eye(30)[..., None] * 100
    assert ((14 - apart[..., 0] < 1) | (8 - apart[..., 1] < 1)).all()
    crowd = spread(
        np.zeros((60, 2)), np.full((60, 2), 10.0), radius=1, box=np.array([[-20.0, -20], [20, 20]])
    )
    assert 0 < crowd.legible.sum() < 60


class _Figure(NamedTuple):
    """What a page hands to plotly's script."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    config: dict[str, Any]

    def hover(self) -> dict[str, str]:
        """What is shown of each token."""
        texts = [text for trace in self.traces for text in trace["hovertext"]]
        return {text.split("<br>")[1].removeprefix("token: "): text for text in texts}


def _figure(page: str) -> _Figure:
    decoder, rest = json.JSONDecoder(), page[page.rindex("Plotly.newPlot(") :].partition('"plot",')[2]
    parts = []
    for _ in _Figure._fields:
        rest = rest.lstrip(" ,\n")
        part, end = decoder.raw_decode(rest)
        parts.append(part)
        rest = rest[end:]
    return _Figure(*parts)


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_a_page_carries_every_token_and_what_is_known_of_it(kind: Any) -> None:
    table = _table(kind)
    points = pca(table.vectors)
    found = _figure(page_of(table, points, name="m", measures=["a < b & c"]))
    assert {*found.hover()} == {*table.tokens}
    classes = {facts_of(token, kind).class_name for token in table.tokens}
    assert [trace["name"] for trace in found.traces] == [name for name in COLOURS if name in classes]
    assert [trace["marker"]["color"] for trace in found.traces] == [
        COLOURS[trace["name"]] for trace in found.traces
    ]
    token = table.tokens[3]
    shown = found.hover()[token]
    assert all(f"{key}: {value}" in shown for key, value in facts_of(token, kind).facts)
    near = nearest(table, token, 5)
    labels = [readable(facts_of(other, kind).label) for other, _ in near]
    assert [line.split() for line in shown.split("<br>")[-5:]] == [
        [label, f"{cosine:.3f}"] for label, (_, cosine) in zip(labels, near, strict=True)
    ]
    drawn = {(x, y) for trace in found.traces for x, y in zip(trace["x"], trace["y"], strict=True)}
    assert drawn == {tuple(point) for point in points.points.round(5).tolist()}
    assert {trace["mode"] for trace in found.traces} == {
        {"atom": "markers+text", "digit": "lines+markers+text", "spacegroup": "markers"}[kind]
    }
    assert found.layout["title"]["subtitle"]["text"].endswith("a &lt; b &amp; c")
    assert [found.layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")] == [*points.axes]


def test_a_page_stands_alone_and_is_the_same_each_time() -> None:
    table = _table("digit")
    text = page_of(table, pca(table.vectors), name="</script><img src=x>")
    assert text == page_of(table, pca(table.vectors), name="</script><img src=x>")
    assert "<title>&lt;/script&gt;&lt;img src=x&gt;: digits" in text
    assert "<img src=x" not in text
    # Scripts within, none from elsewhere, and no button that sends the figure away.
    heads = [part.partition(">")[0] for part in text.split("<script")[1:]]
    assert len(heads) == 3
    assert not any("src" in head for head in heads)
    assert "<link" not in text
    assert not _figure(text).config["showSendToCloud"]
    assert not _figure(text).config["displaylogo"]


def test_digits_are_joined_in_order_whatever_the_order_of_the_file() -> None:
    table = _table("digit")
    mixed = EmbeddingTable("digit", table.tokens[::-1], table.vectors[::-1])
    points = pca(mixed.vectors)
    (trace,) = _figure(page_of(mixed, points, name="m")).traces
    assert trace["text"] == list(table.tokens)
    assert trace["x"] == points.points[::-1, 0].round(5).tolist()


def test_a_kind_that_is_not_drawn_is_refused(tmp_path: Path) -> None:
    table = _table("keyword")
    with pytest.raises(DataError, match="keyword are not drawn"):
        plot_table(table, pca(table.vectors), tmp_path / "x.png", name="m")


def test_the_verb_writes_files_pictures_and_pages_of_a_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["embeddings", str(folder), "--kind", "digit", "--kind", "atom", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    names = {file_name("tiny", kind) for kind in ("atom", "digit")}
    names |= {f"tiny.{kind}.{ending}" for kind in ("atom", "digit") for ending in ("png", "html")}
    assert {path.name for path in out.iterdir()} == names
    assert all(str(out / name) in printed for name in names)
    assert "of the same block" in printed
    assert "component 1 with the digit" in printed
    assert (out / "tiny.atom.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(
        read_csv(out / "tiny.number_vectors.csv").vectors, vectors_of(_weights(), "digit").vectors
    )


def test_the_verb_draws_a_file_of_vectors_and_leaves_it_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.atom_vectors.csv"
    file.write_text(FILE.replace("-1.5", "-1.50"), encoding="utf-8")
    assert main(["embeddings", str(file), "--projection", "tsne", "--out", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["projection"], [*report["kinds"]]) == ("mine", "tsne", ["atom"])
    assert [*report["kinds"]["atom"]["points"]] == ["H", "He", "Li"]
    assert report["kinds"]["atom"]["variance_shares"] is None
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "mine.atom.png", "mine.atom.html"}
    assert "-1.50" in file.read_text(encoding="utf-8")


def test_the_verb_prints_neighbours_and_writes_nothing_then(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["embeddings", str(folder), "--neighbours", "Na", "--neighbours", "225", "--neighbours", "\\n"]
    assert main([*command, "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "Na: nearest by cosine among the 89 of its kind, atom",
        "Fm-3m: nearest by cosine among the 227 of its kind, spacegroup",
        "\\n: nearest by cosine among the 13 of its kind, symbol",
    ]
    assert len(lines) == 3 * 4 + 2
    assert main([*command, "--among", "all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = nearest(vectors_of(_weights(), "all"), "Na")
    assert report["neighbours"][0]["neighbours"] == [[token, cosine] for token, cosine in expected]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--kind", "digit"], ["--kind digit", "atom"]),
        (["--neighbours", "H", "--among", "all"], ["--among all"]),
        (["--neighbours", "7"], ["--neighbours 7", "digit"]),
        (["--neighbours", "Xx"], ["'Xx'"]),
        (["--neighbours", "Na"], ["'Na'", "3 tokens"]),
        (["--out", "mine.csv/out"], ["mine.csv", "cannot be written", "--out"]),
    ],
)
def test_the_verb_refuses_in_one_line(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text(FILE, encoding="utf-8")
    assert main(["embeddings", "mine.csv", *arguments]) > 0
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.csv"]


def test_the_room_needs_neither_jax_nor_matplotlib() -> None:
    code = (
        "import sys, crystallm_jax.embeddings, crystallm_jax.embeddings.page;"
        "print({'jax', 'matplotlib'} & sys.modules.keys())"
    )
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "set()"
