"""Prompts from flags, files and prepared folders: the same prompts, names that fit files, errors with a line."""

import csv
import errno
import io
import re
import tarfile
from pathlib import Path

import pytest

from crystallm_jax.cif import UNCONDITIONAL_PROMPT, make_prompt
from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.errors import DataError, SamplingError
from crystallm_jax.sampling.prompt_files import read_prompts
from crystallm_jax.sampling.prompts import Prompt, composition_prompt, formula_prompts, unique_ids


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


def test_a_csv_of_formulas_names_units_groups_and_numbers(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "p.csv",
        "id,formula,z,spacegroup,n,composition\na,NaCl,4,225,20,\nb,TiO2,2 4,,,\n,CsCl,1,,3,\nc,,,,,Li1F1\nd,KI,,,,\n",
    )
    prompts = read_prompts(path)
    salt, rutile = composition_prompt("Na4Cl4", "225"), formula_prompts("TiO2", (2, 4))
    assert prompts[:5] == [
        Prompt("a", salt.text, 20),
        Prompt("b_Ti2O4", rutile[0].text),
        Prompt("b_Ti4O8", rutile[1].text),
        Prompt("Cs1Cl1", make_prompt("Cs1Cl1"), 3),
        Prompt("c", make_prompt("Li1F1")),
    ]
    assert [prompt.id for prompt in prompts[5:]] == ["d_K1I1", "d_K2I2", "d_K3I3", "d_K4I4"]


def test_several_space_groups_may_stand_beside_a_composition(tmp_path: Path) -> None:
    path = _file(tmp_path, "p.csv", 'composition,spacegroup\nNa4Cl4,"225, P1"\nCs1Cl1,compatible\n')
    ids = [prompt.id for prompt in read_prompts(path)]
    assert ids[:2] == ["Na4Cl4_225", "Na4Cl4_P1"]
    assert {"Cs1Cl1_P1", "Cs1Cl1_Pm-3m"} <= set(ids)
    assert "Cs1Cl1_Fm-3m" not in ids
    lines = _file(tmp_path, "p.txt", "Na4Cl4 225,P1\n")
    assert [prompt.id for prompt in read_prompts(lines)] == ids[:2]


def _archive(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_published_prompt_archives_are_read_as_they_are(tmp_path: Path) -> None:
    salt = make_prompt("Na4Cl4", "Fm-3m")
    members = {"prompts/mp-22862.txt": salt.encode(), "prompts/._x.txt": b"\0", "any.v1.txt": b"data_"}
    path = _archive(tmp_path / "prompts.tar.gz", members)
    assert read_prompts(path) == [Prompt("mp-22862", salt), Prompt("any.v1", UNCONDITIONAL_PROMPT)]
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.tar.gz"]


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({"a.cif": b"data_x"}, SamplingError, "'a.cif': no prompt; an archive of prompts holds texts"),
        ({"../a.txt": b"data_Na4Cl4\n"}, DataError, "points out of the archive"),
        ({"a.txt": b"Na4Cl4\n"}, SamplingError, "'a.txt': 'Na4Cl4.n': a prompt begins with data_"),
        ({"a.txt": b"\xff\xfe"}, SamplingError, "'a.txt': not a text file"),
        ({"a.txt": b"data_" + b" " * 2**20}, SamplingError, "1,048,581 bytes are no prompt"),
        ({}, SamplingError, "holds no prompt"),
    ],
)
def test_archives_of_anything_else_are_refused(
    tmp_path: Path, members: dict[str, bytes], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read_prompts(_archive(tmp_path / "p.tar", members, "w"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_cut_archive_says_so(tmp_path: Path) -> None:
    path = _archive(tmp_path / "p.tar.gz", {"a.txt": b"data_Na4Cl4\n"})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(path)


def test_prompts_as_texts_in_a_folder_or_alone(tmp_path: Path) -> None:
    salt = make_prompt("Na4Cl4", "Fm-3m")
    _file(tmp_path, "b.txt", salt)
    _file(tmp_path, "a.txt", "data_Ti2O4\n")
    assert read_prompts(tmp_path) == [Prompt("a", "data_Ti2O4\n"), Prompt("b", salt)]
    assert read_prompts(tmp_path / "b.txt") == [Prompt("b", salt)]


def test_only_a_prepared_folder_has_space_groups_to_ask_for(tmp_path: Path) -> None:
    path = _file(tmp_path, "p.txt", "Na4Cl4\n")
    with pytest.raises(SamplingError, match="only the records of a prepared folder"):
        read_prompts(path, with_spacegroup=True)


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
        ("p.csv", "", "no column 'composition' or 'formula'; the columns are none"),
        (
            "p.csv",
            "compound,z\nNaCl,4\n",
            "no column 'composition' or 'formula'; the columns are 'compound', 'z'",
        ),
        ("p.csv", "formula,z\nNaCl,0\n", r"p\.csv:2: z='0': expected whole numbers from 1"),
        ("p.csv", "formula,z\nNaCl,fit\n", r"p\.csv:2: z='fit': expected whole numbers"),
        ("p.csv", 'formula,z\nNaCl,"2,2"\n', r"p\.csv:2: z=2,2: one of them stands there twice"),
        ("p.csv", "composition,z\nNaCl,4\n", r"p\.csv:2: z=4: numbers of formula units go with a formula"),
        ("p.csv", "composition,formula\nNa4Cl4,NaCl\n", r"p\.csv:2: both a composition and a formula"),
        ("p.csv", "composition,n\nNa4Cl4,-1\n", r"p\.csv:2: n='-1': expected whole numbers"),
        ("p.csv", "composition,n\nNa4Cl4,two\n", r"p\.csv:2: n='two': expected"),
        (
            "p.csv",
            'composition,spacegroup\nNa4Cl4,"225,Fm-3m"\n',
            r"p\.csv:2: space groups 225,Fm-3m: one of them",
        ),
        ("p.txt", "data_Na4Cl4\nloop_\n\n", "an empty line ends a crystal"),
        ("p.txt", "data_rocksalt\n", "no formula from 'rocksalt' on"),
        ("p.txt", "data_Na4Cl4\n_mine 4\n", "1 of its words have no token"),
        (
            "p.csv",
            "composition,z,spacegroup\nTi4O8,,P4_2/mnm,I4_1/amd\n",
            r"p\.csv:2: more fields than the 3 columns",
        ),
        ("p.csv", "composition, spacegroup\nNa4Cl4,225\n", "column ' spacegroup' would not be read"),
        ("p.csv", "composition,SG\nNa4Cl4,225\n", "column 'SG' would not be read: write 'spacegroup'"),
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


def test_ids_of_a_csv_survive_to_the_names(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "composition"), ("mp-1", "Na4Cl4"), ("mp-1", "Ti2O4")])
    assert [prompt.id for prompt in unique_ids(read_prompts(path))] == ["mp-1", "mp-1-2"]
