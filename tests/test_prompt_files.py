"""Prompts from flags, files and prepared folders: the same prompts, names that fit files, errors with a line."""

import csv
import errno
import re
from pathlib import Path

import pytest

from crystallm_jax.cif import UNCONDITIONAL_PROMPT, make_prompt
from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.errors import CIFError, DataError, SamplingError
from crystallm_jax.sampling.prompts import (
    Prompt,
    composition_prompt,
    formula_prompts,
    read_prompts,
    unconditional_prompt,
    unique_ids,
)


@pytest.fixture(scope="module")
def prepared(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of five crystals."""
    out = tmp_path_factory.mktemp("prompts") / "prepared"
    prepare([fixtures / "data"], out, execution=Execution(workers=0), progress=False)
    return out


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_composition_makes_the_prompt_of_make_prompt() -> None:
    assert composition_prompt("Cl4Na4") == Prompt("Na4Cl4", make_prompt("Na4Cl4"))
    assert composition_prompt("Na4Cl4", "225") == Prompt("Na4Cl4_225", make_prompt("Na4Cl4", "Fm-3m"))
    assert unconditional_prompt().text == UNCONDITIONAL_PROMPT


def test_a_formula_is_asked_for_at_each_number_of_units() -> None:
    prompts = formula_prompts("TiO2", (2, 4), "P4_2/mnm")
    assert [prompt.text for prompt in prompts] == [make_prompt(c, "P4_2/mnm") for c in ("Ti2O4", "Ti4O8")]
    assert [prompt.id for prompt in prompts] == ["Ti2O4_P4_2/mnm", "Ti4O8_P4_2/mnm"]


@pytest.mark.parametrize("z", [(), (0,), (2, -1)])
def test_numbers_of_units_start_at_one(z: tuple[int, ...]) -> None:
    with pytest.raises(SamplingError, match="start at 1"):
        formula_prompts("NaCl", z)


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "p.txt", "\ufeff# wanted\n\nNa4Cl4\n  Ti2O4\tP4_2/mnm  # rutile\r\nCs1Cl1 221")
    assert read_prompts(path) == [
        composition_prompt("Na4Cl4"),
        composition_prompt("Ti2O4", "P4_2/mnm"),
        composition_prompt("Cs1Cl1", "221"),
    ]


def test_a_csv_is_read_by_its_columns(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "p.csv",
        "\ufeffid,note,spacegroup,composition\nmine,x,Fm-3m,Na4Cl4\n,,,Ti2O4\n b ,y, 221 , Cs1Cl1 \n",
    )
    assert read_prompts(path) == [
        Prompt("mine", make_prompt("Na4Cl4", "Fm-3m")),
        Prompt("Ti2O4", make_prompt("Ti2O4")),
        Prompt("b", make_prompt("Cs1Cl1", "Pm-3m")),
    ]


def test_a_csv_of_compositions_alone_is_enough(tmp_path: Path) -> None:
    assert read_prompts(_file(tmp_path, "p.csv", "composition\nNa4Cl4\n")) == [composition_prompt("Na4Cl4")]


def test_a_prepared_folder_asks_for_its_compositions(prepared: Path) -> None:
    prompts = {prompt.id: prompt.text for prompt in read_prompts(prepared)}
    assert set(prompts) == {"caesium_chloride", "halite_symmetric", "perovskite", "prepared", "rocksalt"}
    assert prompts["rocksalt"] == "data_Na4Cl4\n"
    assert prompts["caesium_chloride"] == make_prompt("Cs1Cl1")


def test_a_prepared_folder_can_ask_for_its_space_groups(prepared: Path) -> None:
    # The store's text has single blanks: the prompt that a model of it has seen.
    prompts = {prompt.id: prompt.text for prompt in read_prompts(prepared, with_spacegroup=True)}
    assert prompts["rocksalt"] == re.sub(" +", " ", make_prompt("Na4Cl4", "Fm-3m"))


def test_held_out_records_are_asked_for_first(fixtures: Path, tmp_path: Path) -> None:
    salt, ours = fixtures / "data" / "rocksalt.cif", fixtures / "data" / "perovskite.cif"
    caesium = fixtures / "data" / "caesium_chloride.cif"
    alone = {"execution": Execution(workers=0), "progress": False}
    prepare([salt], tmp_path / "a", val_inputs=[ours], test_inputs=[caesium], **alone)
    assert [prompt.id for prompt in read_prompts(tmp_path / "a")] == ["caesium_chloride"]
    prepare([salt], tmp_path / "b", val_inputs=[ours], **alone)
    assert [prompt.id for prompt in read_prompts(tmp_path / "b")] == ["perovskite"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n # nothing\n", "holds no prompt"),
        ("p.csv", "", "no column 'composition'; the columns are none"),
        ("p.csv", "formula,z\nNaCl,4\n", "no column 'composition'; the columns are 'formula', 'z'"),
        ("p.csv", "composition\n", "holds no prompt"),
        ("p.txt", "Na4Cl4\n\nQq4\n", r"p\.txt:3: 'Qq' is not an element"),
        ("p.txt", "Na4Cl4 P6\n", r"p\.txt:1: space group P6 .* has no token"),
        ("p.txt", "Na4Cl4 Fm-3m 4\n", r"p\.txt:1: 'Na4Cl4 Fm-3m 4': expected a composition"),
        ("p.csv", "composition,spacegroup\nNa4Cl4,\nTi2O4,300\n", r"p\.csv:3: space group number .*300"),
        ("p.csv", "id,composition\na,Na4Cl4\nb,\n", r"p\.csv:3: the composition is empty"),
        ("p.csv", "id,composition\na\n", r"p\.csv:2: the composition is empty"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\xff\xfe\x00", "not a text file"),
        ("p.csv", b"composition\n\xff\xfe\x00\x80", "not a text file"),
        ("p.txt", b"\x00\x01\x02\x00", r"p\.txt:1: composition .* no formula"),
        ("p.csv", b"\x00\x01\x02\x00", "no column 'composition'"),
        ("p.csv", '"a\nb",c\n1,2\n', r"the columns are 'a\\nb', 'c'"),
        # Refused by the csv module's limit, or as a formula where others have raised that limit.
        ("p.csv", "composition\n" + "A" * 200_000, r"p\.csv(:2: 'A' is|: no valid CSV)"),
        ("p.csv", 'composition\n"Na4Cl4\n', r"p\.csv: no valid CSV"),
    ],
)
def test_bad_files_are_one_line_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        read_prompts(_file(tmp_path, name, content))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="no such file of prompts"):
        read_prompts(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="has no split 'train'"):
        read_prompts(tmp_path)


def test_files_that_may_not_be_read_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = _file(tmp_path, "p.txt", "Na4Cl4\n")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SamplingError, match=r"p\.txt: cannot be read: Permission denied"):
        read_prompts(path)


def test_bad_compositions_keep_their_own_error() -> None:
    with pytest.raises(CIFError, match="is not an element"):
        composition_prompt("Qq4")


def test_names_fit_files_on_every_system() -> None:
    prompts = [
        Prompt(name, "data_") for name in ("a/b", "../up", "c:\\d e", "...", "é", "", "P4_2/mnm", "+x-1")
    ]
    names = [prompt.id for prompt in unique_ids(prompts)]
    assert names == ["a-b", "-up", "c--d-e", "prompt", "-", "prompt-2", "P4_2-mnm", "+x-1"]


def test_names_are_unlike_each_other_in_any_case() -> None:
    given = ["salt", "Salt", "salt", "SALT-2", "salt-2", "a/b", "a-b"]
    renamed = unique_ids([Prompt(name, f"data_{i}") for i, name in enumerate(given)])
    names = [prompt.id for prompt in renamed]
    assert len({name.lower() for name in names}) == len(given)
    assert names[0] == "salt"
    assert [prompt.text for prompt in renamed] == [f"data_{i}" for i in range(len(given))]


def test_long_names_still_fit_a_file_name(tmp_path: Path) -> None:
    long = "x" * 300
    prompts = unique_ids([Prompt(long, "data_"), Prompt(long, "data_"), Prompt(long + "y", "data_")])
    assert len({prompt.id for prompt in prompts}) == 3
    for prompt in prompts:
        (tmp_path / f"{prompt.id}__1000000.cif.partial").write_text("")


def test_ids_of_a_csv_survive_to_the_names(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "composition"), ("mp-1", "Na4Cl4"), ("mp-1", "Ti2O4")])
    assert [prompt.id for prompt in unique_ids(read_prompts(path))] == ["mp-1", "mp-1-2"]
