"""`crystallm info`: what a prepared folder holds is counted rightly, and what is wrong with it is said."""

import dataclasses
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, preprocess_cif, stream_text
from crystallm_jax.cli import main
from crystallm_jax.cli.info import _short, _table_rows, report
from crystallm_jax.data import TokenStore
from crystallm_jax.data import describe as describe_module
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.data.describe import describe
from crystallm_jax.data.preparing.writer import StoreWriter
from crystallm_jax.errors import DataError

TOKENIZER = CIFTokenizer()
DROPPED = [
    ("a", "parse", "the text has 3 atoms in 'x'"),
    ("b", "parse", "the text has 17.5 atoms in 'yy'"),
    ("c", "split", "excluded"),
]


def _texts(n: int) -> list[str]:
    records = zip(range(n * 100), read_corpus(), strict=False)
    return [stream_text(preprocess_cif(record.text)) for i, record in records if i % 100 == 0]


TEXTS = _texts(8)
UNNAMED = "data_Na1\nqqq _cell_length_a 5\n\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with StoreWriter(folder) as out:
        for i, text in enumerate(TEXTS):
            split = "val" if i == 2 else "train"
            out.add(f"id-{i}", TOKENIZER.encode_cif(text), split=split, underrepresented=i in {1, 4})
        out.add("unnamed", TOKENIZER.encode_cif(UNNAMED))
        for row in DROPPED:
            out.drop(*row)
        counts = {"input": len(TEXTS) + 1 + len(DROPPED), "kept": len(TEXTS) + 1, "dropped": len(DROPPED)}
        out.commit(
            sources=("a.csv",), options={"symprec": 0.1}, counts=counts, versions={"crystallm-jax": "0.0"}
        )
    return folder


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("piece", [1, 1000, 1 << 22])
def test_counts_are_those_of_the_texts(folder: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(describe_module, "_PIECE_TOKENS", piece)
    found = describe(folder)
    assert found.problems == ()
    assert found.checked
    assert (found.format, found.sources, found.options) == (1, ("a.csv",), {"symprec": 0.1})
    assert list(found.splits) == ["train", "val"]
    train = found.splits["train"]
    texts = [text for i, text in enumerate(TEXTS) if i != 2]
    tokens = [TOKENIZER.tokenize_cif(text) for text in [*texts, UNNAMED]]
    assert (train.records, train.tokens) == (len(tokens), sum(map(len, tokens)))
    expected = Counter(token for record in tokens for token in record)
    assert {t: n for t, n in train.token_counts.items() if n} == dict(expected)
    present = Counter(token for record in tokens for token in set(record))
    assert train.elements == {symbol: present[symbol] for symbol in train.elements}
    assert len(train.elements) == 89
    groups = {token.removesuffix("_sg"): n for token, n in present.items() if token.endswith("_sg")}
    assert train.spacegroups == groups
    assert (train.without_spacegroup, train.unk, train.underrepresented) == (1, 1, 2)
    lengths = [len(record) for record in tokens]
    assert (train.lengths.shortest, train.lengths.longest) == (min(lengths), max(lengths))
    assert train.lengths.median == np.median(lengths)
    assert train.lengths.mean == pytest.approx(np.mean(lengths))
    assert train.lengths.longer == {c: sum(n > c for n in lengths) for c in (1024, 2048)}
    assert sum(train.lengths.histogram) == len(lengths)
    assert found.splits["val"].underrepresented == 0


def test_the_histogram_has_few_bins() -> None:
    lengths = describe_module._lengths(np.array([5, 900_000]))
    assert len(lengths.histogram) <= 256
    assert lengths.histogram[0] == lengths.histogram[-1] == 1
    assert lengths.bin_width * len(lengths.histogram) > 900_000


def test_reasons_that_differ_in_values_are_one(folder: Path) -> None:
    assert [tuple(group) for group in describe(folder).dropped] == [
        ("parse", "the text has … atoms in …", 2, DROPPED[0][2]),
        ("split", "excluded", 1, "excluded"),
    ]


def test_a_list_of_dropped_that_is_none(folder: Path) -> None:
    (folder / "dropped.csv").write_text("id,stage\nx,y\n")
    with pytest.raises(DataError, match=r"dropped.csv cannot be read"):
        describe(folder)


def test_the_report_is_text_of_100_columns(folder: Path) -> None:
    text = report(describe(folder)).replace(str(folder), "store")
    assert max(map(len, text.splitlines())) <= 100
    assert all(line == line.rstrip() for line in text.splitlines())
    for part in (
        "9 records",
        "records by length",
        "Cl",
        "cubic",
        "never seen",
        "a.csv",
        "verified",
        "none named",
    ):
        assert part in text, part
    train = describe(folder).splits["train"]
    assert f"{train.tokens:,}" in text
    assert train.sha256 in text


def test_the_periodic_table_is_whole() -> None:
    rows = list(_table_rows())
    assert sorted(number for row in rows for number in row if number) == list(range(1, 119))
    columns = {number: row.index(number) for row in rows for number in row}
    # Groups 1, 2, 14 and 18.
    for column, numbers in {0: (1, 3, 87), 1: (4, 88), 13: (6, 14, 82), 17: (2, 10, 18, 86)}.items():
        assert {columns[number] for number in numbers} == {column}
    assert [_short(n) for n in (0, 999, 1000, 9_960, 123_456, 2_300_000)] == [
        *("0", "999", "1.0k", "10k", "123k", "2.3M")
    ]


def test_the_command_prints_and_verifies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    assert capsys.readouterr().out == report(describe(folder))
    assert main(["info", str(folder), "--no-verify"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed == json.loads(json.dumps(dataclasses.asdict(describe(folder))))
    assert parsed["splits"]["train"]["elements"]["Ne"] == 0


def test_a_changed_token_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "train.bin"
    data = bytearray(path.read_bytes())
    data[100:102] = (TOKENIZER.unk_id).to_bytes(2, "little")
    path.write_bytes(data)
    assert main(["info", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "2 things wrong" in out
    assert "has the <unk> count 2, meta.json says 1" in out
    assert "has changed since it was prepared" in out
    assert main(["info", str(folder), "--no-verify"]) == 1


@pytest.mark.parametrize(
    ("place", "token", "problem"),
    [(0, 3, "1 records that do not start with 'data_'"), (7, 60_000, "1 ids outside the vocabulary")],
)
def test_wrong_tokens_are_named(folder: Path, place: int, token: int, problem: str) -> None:
    tokens = np.fromfile(folder / "val.bin", "<u2")
    tokens[place] = token
    tokens.tofile(folder / "val.bin")
    assert any(problem in line and "val.bin" in line for line in describe(folder).problems)


def test_files_that_do_not_fit_are_named(folder: Path) -> None:
    (folder / "train.ids.txt").write_text("one\n")
    np.save(folder / "train.underrep.npy", np.array([1]))
    (folder / "dropped.csv").unlink()
    (folder / "val.bin").unlink()
    _edit(folder, counts={"input": 9, "kept": 1, "dropped": 2})
    problems = "\n".join(describe(folder).problems)
    for part in (
        "has 1 ids for 8 records",
        "underrep.npy does not hold rising starts",
        "no split 'val'",
        "9 inputs, but 1 kept and 2 dropped",
        "1 kept, its splits have 9 records",
        "2 dropped, dropped.csv is missing",
    ):
        assert part in problems, part
    assert "val" not in describe(folder).splits
    (folder / "train.ids.txt").unlink()
    assert "train.ids.txt is missing" in "\n".join(describe(folder).problems)


def test_a_store_of_which_no_split_opens_is_still_described(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(b"\x00\x00")
    text = report(describe(folder))
    assert text.startswith(f"{folder}: 0 records, 0 tokens")
    assert "2 things wrong" in text


def test_published_files_alone(tmp_path: Path) -> None:
    stream = np.concatenate([TOKENIZER.encode_cif(text) for text in TEXTS])
    stream.astype("<u2").tofile(tmp_path / "train.bin")
    found = describe(tmp_path)
    assert (found.format, found.problems, found.checked) == (0, (), False)
    assert found.splits["train"].records == len(TEXTS)
    assert "no checksums to compare" in report(found)
    np.append(TOKENIZER.encode_cif("Na\n\n"), stream).astype("<u2").tofile(tmp_path / "train.bin")
    assert TokenStore.open(tmp_path).starts[0] == 3
    assert "begins with 3 tokens that belong to no record" in describe(tmp_path).problems[0]


def test_a_published_archive(tmp_path: Path) -> None:
    stream = np.concatenate([TOKENIZER.encode_cif(text) for text in TEXTS])
    stream.astype("<u2").tofile(tmp_path / "train.bin")
    archive = tmp_path / "tokens_x.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "train.bin", "tokens_x/train.bin")
    assert describe(archive).splits["train"].records == len(TEXTS)


def test_what_is_no_store_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.ids.txt").write_text("x\n")
    for name in (tmp_path, tmp_path / "nowhere", tmp_path / "train.ids.txt"):
        assert main(["info", str(name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("crystallm info: ")
        assert error.count("\n") == 1


def test_the_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lengths.png"
    assert main(["info", str(folder), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["info", str(folder), "--plot", str(tmp_path / "lengths.qqq")]) == 1
    assert "cannot be drawn" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from crystallm_jax.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    main(['info', '--help'])\n"
        "assert 'crystallm info data/mine' in out.getvalue()\n"
        "assert not {'jax', 'pymatgen', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
