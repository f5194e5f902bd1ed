"""The command line: help, exit codes, the whole way once, and one clear line for each thing a user gets wrong."""

import csv
import gzip
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import crystallm_jax
from crystallm_jax.cif import CIFError
from crystallm_jax.cli import main
from crystallm_jax.cli import sample as sample_verb
from crystallm_jax.data.prepare import prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.model import ModelConfig, init_params
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import write_folder

ROOT = Path(__file__).parents[1]
VERBS = ("prepare", "train", "sample")
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)
SHAPE = ("n_layer=2", "n_head=2", "n_embd=32", "block_size=64", "batch_size=2", "dtype=float32")
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
ENVIRONMENT["JAX_PLATFORMS"] = "cpu"
STEPS = ("gradient_accumulation_steps=1", "max_iters=2", "warmup_iters=1", "lr_decay_iters=2")


class Places(NamedTuple):
    """What the commands are given: `{bad}`, `{cifs}`, `{model}`, `{data}`, `{run}` and `{out}` in their words."""

    bad: Path
    cifs: Path
    model: Path
    data: Path
    run: Path
    out: Path


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`main` sets up logging, as is a program's right; the tests after it want it as it was."""
    loggers = [logging.getLogger(name) for name in ("crystallm_jax", "absl")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="module")
def cifs(fixtures: Path) -> Path:
    return fixtures / "data"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a folder."""
    path = tmp_path_factory.mktemp("cli") / "model"
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    write_folder(path, Model(CONFIG, params))
    return path


@pytest.fixture(scope="module")
def data(cifs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of five crystals, without a validation set."""
    path = tmp_path_factory.mktemp("cli") / "data"
    prepare([cifs], path, execution=Execution(workers=0), progress=False)
    return path


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The exit code and the run folder of `train`."""
    path = tmp_path_factory.mktemp("cli") / "run"
    return main(["train", *SHAPE, *STEPS, f"dataset={data}", f"out_dir={path}"]), path


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, cifs: Path, model: Path, data: Path) -> Path:
    """A folder of all that can be wrong with a file."""
    folder = tmp_path_factory.mktemp("cli") / "bad"
    (folder / "empty_folder").mkdir(parents=True)
    junk = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    texts = {
        "blank.cif": "\n \n",
        "words.cif": "It is a truth universally acknowledged.\n",
        "crowd.cif": _crowd(5000),
        "no_cif_column.csv": "id,structure\n1,x\n",
        "header.csv": "id,cif\n",
        "structures.zip": "PK",
        "no_prompt.txt": "# nothing\n",
        "formula.txt": "Na4Cl4\nNa(OH)2\n",
        "no_composition.csv": "compound\nNaCl\n",
        "own_numbers.csv": "composition,n\nNa4Cl4,3\n",
        "spacegroup.csv": "composition,spacegroup\nNa4Cl4,P6\n",
        "unknown_key.yaml": "n_layer: 2\nn_heads: 2\n",
        "wrong_type.yaml": "n_layer: two\n",
        "broken.yaml": "n_layer: [2\n",
        "list.yaml": "- n_layer\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("empty.cif", "empty.csv", "empty.txt", "empty.pt"):
        (folder / name).write_bytes(b"")
    for name in ("junk.cif", "junk.csv", "junk.txt", "junk.pt", "junk.yaml"):
        (folder / name).write_bytes(junk)
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"id,cif\n" + junk.hex().encode())[:-500])
    _copy(model, folder / "other_shape", "config.yaml", lambda b: b.replace(b"n_embd: 32", b"n_embd: 64"))
    _copy(model, folder / "cut_model", "model.safetensors", lambda b: b[:-100])
    _copy(data, folder / "cut_data", "train.bin", lambda b: b[:-100])
    _copy(
        data,
        folder / "other_words",
        "meta.json",
        lambda b: b.replace(b'"vocabulary_sha256": "', b'"vocabulary_sha256": "0'),
    )
    (folder / "done" / "cifs").mkdir(parents=True)
    (folder / "done" / "cifs" / "Na4Cl4__1.cif").write_text("data_Na4Cl4\n")
    return folder


@pytest.fixture
def places(
    bad: Path, cifs: Path, model: Path, data: Path, trained: tuple[int, Path], tmp_path: Path
) -> Places:
    return Places(bad, cifs, model, data, trained[1], tmp_path / "out")


def _copy(source: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """A copy of a folder with one file changed."""
    target.mkdir()
    for file in source.iterdir():
        content = file.read_bytes()
        changed = change(content) if file.name == name else content
        assert (changed != content) == (file.name == name)
        (target / file.name).write_bytes(changed)


def _crowd(n: int) -> str:
    """A cell of n atoms, 3 Å apart."""
    side = round(n ** (1 / 3)) + 1
    points = itertools.islice(itertools.product(range(side), repeat=3), n)
    rows = "".join(
        f"Na Na{i} 1 {x / side:.6f} {y / side:.6f} {z / side:.6f} 1\n" for i, (x, y, z) in enumerate(points)
    )
    cell = "".join(f"_cell_length_{k} {3 * side}\n" for k in "abc")
    cell += "".join(f"_cell_angle_{k} 90\n" for k in ("alpha", "beta", "gamma"))
    columns = ("type_symbol", "label", "symmetry_multiplicity", "fract_x", "fract_y", "fract_z", "occupancy")
    loop = "loop_\n" + "".join(f"_atom_site_{name}\n" for name in columns)
    return f"data_Na{n}\n_symmetry_space_group_name_H-M 'P 1'\n{cell}{loop}{rows}"


def _words(command: str, places: Places) -> list[str]:
    """A command line as a shell would split it, with the places filled in; '' stands for an empty word."""
    return ["" if word == "''" else word.format(**places._asdict()) for word in command.split()]


def _run(*words: str | Path, expected: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Start a program from the checkout, as a user would."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    return done


# Help and usage.


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_defaults_an_example_and_flags_in_kebab_case(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"  crystallm {verb} " in text
    assert "default" in text
    flags = set(re.findall(r"(?<!\S)\[?(--\w[\w-]*)", text))
    assert flags
    assert all(re.fullmatch("--[a-z]+(-[a-z]+)*", flag) for flag in flags)


def test_help_lists_the_verbs_and_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("--help", VERBS), ("--version", (crystallm_jax.__version__,))):
        with pytest.raises(SystemExit) as caught:
            main([flag])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in expected)


def test_help_loads_neither_jax_nor_pymatgen() -> None:
    code = """
import contextlib, io, sys
from crystallm_jax.cli import main
for words in ([verb, "--help"] for verb in ("prepare", "train", "sample")):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
print(*({"jax", "flax", "orbax", "grain", "pymatgen", "scipy", "ase", "omegaconf"} & sys.modules.keys()))
"""
    assert _run("-c", code).stdout.split() == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: VERB"),
        ("simple", "invalid choice: 'simple'"),
        ("prepare x", "required: --out"),
        ("prepare x --out y --stages polish", "'polish' is no stage"),
        ("prepare x --out y --executor cloud", "invalid choice: 'cloud'"),
        ("prepare --out x", "required: INPUT"),
        ("train n_layer=2 --config tiny 3", "unrecognized arguments: 3"),
        ("train --layers 3", "unrecognized arguments: --layers"),
        (
            "sample --out x",
            "one of the arguments --composition --formula --elements --prompts --unconditional is required",
        ),
        ("sample --composition Na4Cl4", "required: --out"),
        ("sample --composition Na4Cl4 --unconditional --out x", "not allowed with argument --composition"),
        ("sample --unconditional --out x --num-samples two", "'two': expected a whole number from 1 on"),
        (
            "sample --unconditional --out x --num-samples 0",
            "--num-samples: '0': expected a whole number from 1",
        ),
        ("sample --unconditional --out x --target-valid 0", "'0': expected a whole number from 1 on"),
        ("sample --unconditional --out x --limit-samples -3", "'-3': expected a whole number from 1 on"),
        ("sample --unconditional --out x --batch-size 0", "'0': expected a whole number from 1 on"),
        ("sample --unconditional --out x --max-new-tokens 0", "'0': expected a whole number from 1 on"),
        ("sample --unconditional --out x --workers 0", "'0': expected a whole number from 1 on"),
        ("sample --unconditional --out x --temperature hot", "'hot': expected a number above 0"),
        ("sample --unconditional --out x --temperature 0", "most likely token use --top-k 1"),
        ("sample --unconditional --out x --temperature nan", "'nan': expected a number above 0"),
        ("sample --unconditional --out x --top-k -1", "'-1': expected a whole number from 0 on"),
        ("sample --unconditional --out x --top-p 2", "'2': expected a share above 0 and at most 1"),
        ("sample --unconditional --out x --top-p 0", "'0': expected a share above 0 and at most 1"),
        ("sample --unconditional --out x --seed -1", "'-1': expected a whole number from 0 to 4294967295"),
        ("sample --unconditional --out x --seed 4294967296", "expected a whole number from 0 to 4294967295"),
        ("sample --unconditional --out x --time-limit 0", "'0': expected a number of seconds above 0"),
        ("sample --unconditional --out x --constrain all", "invalid choice: 'all'"),
        ("sample --formula NaCl --z some --out x", "expected whole numbers from 1 on such as 1,2,4"),
        ("sample --formula NaCl --z 0 --out x", "expected whole numbers from 1 on such as 1,2,4"),
        ("sample --composition Na4Cl4 --limit 0 --out x", "expected a whole number from 1 on"),
        ("sample --composition Na4Cl4 --out x --overflow wrap", "invalid choice: 'wrap'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err.splitlines()[-1]
    assert shown.out == ""


@pytest.mark.parametrize(
    ("words", "expected", "said"),
    [
        (("train.py", "--help"), 0, "key=value"),
        (("sample.py", "--help"), 0, "--composition"),
        (("train.py", "n_layers=3"), 2, "did you mean 'n_layer'?"),
        (("sample.py", "--composition", "Qq4", "--out", "never"), 1, "'Qq' is not an element"),
        (("-m", "crystallm_jax", "sample", "--composition", "Qq4", "--out", "never"), 1, "not an element"),
        (("-m", "crystallm_jax", "--version"), 0, crystallm_jax.__version__),
    ],
)
def test_entry_points_of_a_checkout(words: tuple[str, ...], expected: int, said: str) -> None:
    done = _run(*words, expected=expected)
    assert said in (done.stderr if expected else done.stdout)
    assert len(done.stderr.splitlines()) == bool(expected)
    assert not (ROOT / "never").exists()


# The whole way.


def test_prepare_says_what_became_of_the_input(
    cifs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(cifs), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("8 structures read, 5 kept, 3 dropped")
    assert shown.err == ""
    assert {"train.bin", "train.starts.npy", "meta.json", "dropped.csv"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_train_leaves_a_run_that_can_be_sampled(
    trained: tuple[int, Path], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, run = trained
    assert code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "lr", "tokens_per_s"} <= lines[0].keys()
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= {path.name for path in run.iterdir()}
    capfd.readouterr()
    settings = ["--formula", "NaCl", "--z", "1,2", "--num-samples", "2", "--max-new-tokens", "5"]
    out = tmp_path / "out"
    words = ["sample", "--model", str(run), *settings, "--workers", "1", "--out", str(out)]
    assert main(words) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("4 samples, 0 valid (0.0%)\n       4  unfinished\n20 tokens in ")
    assert shown.err == ""
    names = {f"{cell}__{n}.cif" for cell in ("Na1Cl1", "Na2Cl2") for n in (1, 2)}
    assert {path.name for path in (out / "cifs").iterdir()} == names
    with (out / "samples.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert json.loads((out / "run.json").read_text())["model"] == str(run)
    assert (out / "structures.extxyz").read_text() == ""


def test_batch_sizes_and_order_of_prompts_give_the_same_files(model: Path, tmp_path: Path) -> None:
    compositions = ["Na4Cl4", "Ti2O4", "Cs1Cl1"]
    written = []
    for number, (order, size) in enumerate(((compositions, "6"), (compositions[::-1], "2"))):
        (tmp_path / f"{number}.txt").write_text("\n".join(order))
        out = tmp_path / str(number)
        words = ["--prompts", str(tmp_path / f"{number}.txt"), "--num-samples", "2", "--batch-size", size]
        words += ["--max-new-tokens", "20", "--seed", "4", "--workers", "1", "--out", str(out)]
        assert main(["sample", "--model", str(model), *words]) == 0
        written.append({path.name: path.read_text() for path in (out / "cifs").iterdir()})
    assert len(written[0]) == 6
    assert written[0] == written[1]


def test_a_terminated_run_leaves_what_it_finished(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--unconditional", "--num-samples", "20000", "--batch-size", "4", "--workers", "1"]

    def terminate() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if list(out.glob("cifs/*.cif")):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=terminate, daemon=True)
    watcher.start()
    assert main(["sample", "--model", str(model), *words, "--out", str(out)]) == 75
    watcher.join(10)
    shown = capfd.readouterr()
    assert shown.err.splitlines() == [
        f"{out}: what is judged is kept; the same command with --resume goes on",
        "crystallm sample: interrupted",
    ]
    assert shown.out == ""
    names = {path.name for path in out.glob("cifs/*")}
    assert names
    assert all(name.endswith(".cif") for name in names)
    with (out / "samples.csv").open(newline="") as stream:
        assert {Path(row["file"]).name for row in csv.DictReader(stream)} <= names


def test_a_killed_run_goes_on_and_ends_with_the_same_files(model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    journal = cut / "journal-0.jsonl"
    words = ["sample", "--model", str(model), "--unconditional", "--num-samples", "90", "--batch-size", "4"]
    words += ["--workers", "1", "--seed", "5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "crystallm_jax", *words, "--out", cut],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.stat().st_size > 0:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(100)
    assert process.returncode == -signal.SIGKILL
    assert not (cut / "run.json").exists()
    for out in (whole, cut):
        assert main([*words, "--out", str(out), *["--resume"] * (out == cut)]) == 0
    assert _lasting(cut) == _lasting(whole)
    assert len(list((cut / "cifs").iterdir())) == 90
    session = json.loads((cut / "run.json").read_text())["session"]
    assert session["found"] == 90 - session["samples"] > 0


def _lasting(out: Path) -> dict[str, object]:
    """The files of a sampling run, without what may differ between two runs that are the same."""
    found: dict[str, object] = {str(path.relative_to(out)): path.read_bytes() for path in _files(out)}
    with (out / "samples.csv").open(newline="") as stream:
        found["samples.csv"] = [{**row, "seconds": ""} for row in csv.DictReader(stream)]
    written = json.loads((out / "run.json").read_text())
    found["run.json"] = {name: value for name, value in written.items() if name != "session"}
    return found


def test_a_target_goes_on_up_to_its_limit_and_says_which_prompts_are_short(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sample",
        "--model",
        str(model),
        "--composition",
        "Na4Cl4",
        "--workers",
        "1",
        "--max-new-tokens",
        "9",
    ]
    words += ["--target-valid", "2", "--limit-samples", "5", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[0] == "5 samples, 0 valid (0.0%)"
    assert "fewer than 2 valid after the most samples allowed: Na4Cl4" in shown
    assert main([*words, "--resume"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[:2] == [
        f"{tmp_path / 'out'}: all its samples are there already, nothing to do",
        "5 samples, 0 valid (0.0%)",
    ]


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_verb, "prompts_from", interrupted)
    assert main(["sample", "--unconditional", "--out", "never"]) == 130
    assert capsys.readouterr().err == "crystallm sample: interrupted\n"


def test_only_errors_meant_for_users_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(sample_verb, "prompts_from", broken)
    with pytest.raises(ZeroDivisionError):
        main(["sample", "--unconditional", "--out", "never"])
    assert issubclass(CIFError, ValueError)


# What a user gets wrong: (command, exit code, what is said).

_NONE_KEPT = "none of 1 records can be kept"

WRONG_INPUTS = [
    ("prepare {bad}/absent.csv --out {out}", 1, r"no file or folder .*absent\.csv: check the name"),
    ("prepare {bad}/empty.cif --out {out}", 1, r"empty\.cif is empty"),
    ("prepare {bad}/empty.csv --out {out}", 1, r"empty\.csv is empty"),
    ("prepare {bad}/blank.cif --out {out}", 1, r"blank\.cif is empty"),
    ("prepare {bad}/empty_folder --out {out}", 1, r"no \.cif files in the folder"),
    ("prepare {bad}/junk.cif --out {out}", 1, r"junk\.cif is binary"),
    ("prepare {bad}/junk.csv --out {out}", 1, r"junk\.csv is binary"),
    ("prepare {bad}/cut.csv.gz --out {out}", 1, "check that it is whole"),
    ("prepare {bad}/junk.pt --out {out}", 1, "unknown kind of file; give a folder"),
    ("prepare {bad}/structures.zip --out {out}", 1, "File is not a zip file.*check that it is whole"),
    ("prepare {bad}/no_cif_column.csv --out {out}", 1, "no column 'cif'"),
    ("prepare {bad}/header.csv --out {out}", 1, "a header and no rows"),
    ("prepare {bad}/words.cif --out {out}", 1, f"{_NONE_KEPT}.*no structure could be read"),
    ("prepare {cifs}/partial.cif --out {out}", 1, f"{_NONE_KEPT}.*partially occupied"),
    ("prepare {bad}/crowd.cif --out {out}", 1, f"{_NONE_KEPT}.*5,000 atoms, at most 2,000"),
    ("prepare {cifs}/unknown_element.cif --out {out}", 1, f"{_NONE_KEPT}.*has no token"),
    ("prepare {cifs}/polonium.cif --out {out}", 1, f"{_NONE_KEPT}.*'Po', which has no token"),
    ("prepare {cifs} --out {bad}/empty.cif", 1, r"empty\.cif"),
    ("prepare {cifs} --out {out} --symprec 0", 2, "symprec is 0.0"),
    ("prepare {cifs} --out {out} --decimal-places 0", 2, "0 decimal places"),
    ("prepare {cifs} --out {out} --time-limit 0", 2, "a time limit of 0"),
    ("prepare {cifs} --out {out} --split --val {cifs}", 2, "cannot go together"),
    ("prepare {cifs} --out {out} --split 0.1,1.5", 2, "two shares below 1 or two numbers"),
    ("prepare {cifs} --out {out} --split-by formula", 2, "does nothing alone: give --split too"),
    ("prepare {cifs} --out {out} --exclude-by formula", 2, "give --exclude too"),
    ("prepare {cifs} --out {out} --ray-address auto", 2, "give --executor ray too"),
    ("prepare {cifs} --out {out} --executor ray --workers 0", 2, "give at least 1"),
    ("prepare {cifs} --out {out} --stages symmetrise,tokenise", 2, "give neighbours of"),
    ("prepare {cifs} --out {out} --stages tokenise --oxidation-states", 2, "add it, or leave them out"),
    ("prepare {cifs} --out {out} --exclude {bad}/absent.csv", 1, r"no file or folder .*absent\.csv"),
    ("prepare {cifs} --out {out} --underrepresented {bad}/absent.csv", 1, "of under-represented pairs"),
    ("prepare {cifs} --out {out} --underrepresented {bad}/header.csv", 1, "lacks the columns"),
    ("prepare {cifs} --out {out} --underrepresented-below 0", 2, "a number of at least 1"),
    ("prepare {cifs} --out {out} --seed -1", 2, "give one from 0"),
]

WRONG_REQUESTS = [
    ("--composition Na(OH)2", 1, r"'Na\(OH\)2' is no formula from '\(OH\)2' on"),
    ("--composition na4", 1, "is no formula"),
    ("--composition ''", 1, "the composition is empty"),
    ("--composition Qq4", 1, "'Qq' is not an element"),
    ("--composition Po1", 1, "element Po has no token"),
    ("--composition Na0Cl4", 1, "has no Na: leave it out"),
    ("--composition Na0.5Cl1", 1, "counts are whole numbers"),
    ("--composition Na4Cl4 --spacegroup Fm3m", 1, r"space group 'Fm3m' is unknown: did you mean .*Fm-3m"),
    ("--composition Na4Cl4 --spacegroup P6", 1, r"space group P6 \(number 168\) has no token"),
    ("--composition Na4Cl4 --spacegroup 300", 1, "space group number '300' is outside 1 to 230"),
    ("--unconditional --spacegroup Fm-3m", 2, "--spacegroup goes with --composition or --formula"),
    ("--unconditional --max-sites 4", 2, "--max-sites cannot be honoured with --unconditional"),
    ("--elements Fe-Al", 1, "no element has a negative oxidation state"),
    ("--prompts {bad}/absent.txt", 1, r"absent\.txt: no such file of prompts"),
    ("--prompts {bad}/empty.txt", 1, r"empty\.txt: holds no prompt"),
    ("--prompts {bad}/no_prompt.txt", 1, r"no_prompt\.txt: holds no prompt"),
    ("--prompts {bad}/junk.txt", 1, r"junk\.txt: not a text file"),
    ("--prompts {bad}/formula.txt", 1, r"formula\.txt:2: composition 'Na\(OH\)2'"),
    ("--prompts {bad}/no_composition.csv", 1, "no column 'composition'"),
    ("--prompts {bad}/spacegroup.csv", 1, r"spacegroup\.csv:2: space group P6"),
    ("--prompts {bad}/empty_folder", 1, "has no split 'train'"),
    ("--prompts {bad}/cut_data", 1, "truncated or mixed with another"),
    ("--prompts {bad}/own_numbers.csv --target-valid 2", 2, r"want \(n=3 of Na4Cl4\)"),
    ("--unconditional --limit-samples 5", 2, "--limit-samples goes with --target-valid"),
    ("--unconditional --num-samples 2 --target-valid 2", 2, "do not go together"),
    ("--unconditional --target-valid 9 --limit-samples 5", 2, "--limit-samples 5 is below --target-valid 9"),
    ("--unconditional --target-valid 9 --overflow slide", 2, "use --overflow stop"),
    ("--unconditional --constrain syntax --overflow slide", 2, "--constrain does not go with"),
]

WRONG_MODELS = [
    ("{bad}/absent", 1, "absent: no model there; expected a file"),
    ("{bad}/empty_folder", 1, "no model there; expected"),
    ("{bad}/empty.pt", 1, r"empty\.pt: not a PyTorch checkpoint"),
    ("{bad}/junk.pt", 1, r"junk\.pt: not a PyTorch checkpoint"),
    ("{bad}/cut_model", 1, "damaged or changed since it was written"),
    (
        "{bad}/other_shape",
        1,
        r"tensor wte\.embedding has shape \(371, 32\); the configuration asks for \(371, 64\)",
    ),
]

WRONG_RUNS = [
    ("", 2, "dataset is not set: give dataset=DIR"),
    ("dataset={bad}/absent", 1, "no prepared folder .*absent"),
    ("dataset={bad}/empty_folder", 1, "has no split 'train'"),
    ("dataset={bad}/cut_data", 1, "truncated or mixed with another"),
    ("dataset={bad}/other_words", 1, "prepared with another vocabulary"),
    ("dataset={data} validate=true", 1, r"has no split 'val' \(it has: train\)"),
    ("dataset={data} block_size=9000", 1, "fewer than one window of 9001"),
    ("n_layers=2", 2, "unknown configuration key 'n_layers' in the command line; did you mean 'n_layer'"),
    ("distributed=maybe", 2, "distributed in the command line: Invalid value 'maybe'"),
    ("coordinator_address=host:99999 num_processes=2 process_id=0", 2, "its port must be from 1 to 65535"),
    (
        "dataset={data} compilation_cache={bad}/empty.txt",
        2,
        r"compilation_cache=.*empty\.txt: cannot be made",
    ),
    ("n_layer=two", 2, "n_layer in the command line: .*'two'"),
    ("n_layer=2.5", 2, "n_layer in the command line"),
    ("learning_rate=fast", 2, "learning_rate in the command line"),
    ("validate=maybe", 2, "validate in the command line"),
    ("validate=3", 2, "validate=3 in the command line: expected true or false"),
    ("windows=somewhere", 2, "windows in the command line"),
    ("batch_size=0", 2, "batch_size=0: must be at least 1"),
    ("dataset={data} n_embd=33", 2, "n_embd=33 is not a multiple of n_head=2"),
    ("dataset={data} fsdp=3", 2, "fsdp=3 does not divide"),
    ("verbose", 2, "'verbose' on the command line is not of the form key=value"),
    ("--config {bad}/absent.yaml", 2, r"absent\.yaml: no such file; configurations by name are"),
    ("--config gigantic", 2, "gigantic: no such file; configurations by name are .*small"),
    ("--config {bad}/unknown_key.yaml", 2, r"'n_heads' in .*unknown_key\.yaml; did you mean 'n_head'"),
    ("--config {bad}/wrong_type.yaml", 2, r"n_layer in .*wrong_type\.yaml"),
    ("--config {bad}/broken.yaml", 2, r"broken\.yaml: cannot be read as YAML"),
    ("--config {bad}/list.yaml", 2, "holds no `key: value` lines"),
    ("--config {bad}/junk.yaml", 2, r"junk\.yaml: cannot be read as YAML"),
    ("dataset={data} init_from=resume", 1, "no complete checkpoint; start with init_from=scratch"),
    ("dataset={data} init_from={bad}/absent", 1, "no model there; expected"),
    ("dataset={data} init_from={bad}/junk.pt", 1, "not a PyTorch checkpoint"),
    ("dataset={data} init_from={model} n_layer=3", 1, "n_layer=2, the configuration says n_layer=3"),
    (
        "dataset={data} init_from={model} n_layer=3 n_embd=64",
        1,
        "its model has n_layer=2 n_embd=32, the configuration says n_layer=3 n_embd=64",
    ),
    ("dataset={data} init_from={model} block_size=65", 1, "its context is 64 tokens"),
    ("dataset={data} out_dir={run}", 2, "already holds a run at step 2: use init_from=resume"),
    (
        "dataset={data} out_dir={run} init_from=resume n_embd=64",
        1,
        "n_embd=32, the configuration says n_embd=64",
    ),
    (
        "dataset={data} out_dir={run} init_from=resume optimizer=muon",
        1,
        "trained with optimizer=adamw, now optimizer=muon .* set optimizer back",
    ),
    (
        "dataset={data} out_dir={run} init_from=resume ema_decay=0.9",
        1,
        r"trained with ema_decay=0\.0, now ema_decay=0\.9",
    ),
    ("dataset={data} out_dir={bad}/empty.txt", 2, r"out_dir=.*empty\.txt: cannot be made: File exists"),
]


def _fails(words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The command ends with the code and one line."""
    capfd.readouterr()
    assert main(words) == code
    shown = capfd.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1, shown.err
    assert shown.err.startswith(f"crystallm {words[0]}: ")
    assert re.search(message, shown.err), shown.err


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("command", "code", "message"), WRONG_INPUTS)
def test_prepare_refuses_in_one_line(
    command: str, code: int, message: str, places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    before = len(_files(places.bad))
    _fails(_words(f"{command} --workers 0", places), code, message, capfd)
    assert not places.out.exists()
    assert len(_files(places.bad)) == before


@pytest.mark.parametrize(("command", "code", "message"), WRONG_REQUESTS)
def test_sample_refuses_in_one_line(
    command: str, code: int, message: str, places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    words = _words(f"sample --model {{model}} --out {{out}} {command}", places)
    _fails(words, code, message, capfd)
    assert not places.out.exists()


@pytest.mark.parametrize(("model_path", "code", "message"), WRONG_MODELS)
def test_sample_refuses_what_is_no_model(
    model_path: str, code: int, message: str, places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    words = _words(f"sample --model {model_path} --out {{out}} --unconditional", places)
    _fails(words, code, message, capfd)
    assert not places.out.exists()


def test_sample_refuses_a_folder_of_samples_and_a_file(
    places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    for out, message in (("done", "holds samples already"), ("empty.cif", "cannot be made: Not a directory")):
        words = _words(f"sample --model {{model}} --out {{bad}}/{out} --unconditional", places)
        _fails(words, 1, message, capfd)
    assert _files(places.bad / "done") == [places.bad / "done" / "cifs" / "Na4Cl4__1.cif"]


def test_a_prompt_beyond_the_context_leaves_the_folder_free(
    places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    words = _words("sample --model {model} --out {out} --composition Na4Cl4", places)
    _fails([*words, "--spacegroup", "Fm-3m"], 1, "tokens; the model's context takes 1 to 64", capfd)
    assert _files(places.out) == []
    assert main([*words, "--max-new-tokens", "1", "--workers", "1"]) == 0


@pytest.mark.parametrize(("command", "code", "message"), WRONG_RUNS)
def test_train_refuses_in_one_line(
    command: str, code: int, message: str, places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(_files(places.run))
    settings = "" if command.startswith("--config") else " ".join((*SHAPE, *STEPS))
    _fails(_words(f"train out_dir={{out}} {settings} {command}", places), code, message, capfd)
    assert _files(places.out) == []
    assert sorted(_files(places.run)) == before
