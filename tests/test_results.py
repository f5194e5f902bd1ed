"""The folder of a sampling run: every file says the same, and nothing that was made is lost."""

import csv
import errno
import json
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import ase
import ase.io
import numpy as np
import pytest

from crystallm_jax.cif import CIFTokenizer, make_prompt, preprocess_cif, stream_text, symmetrized_cif
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation import ValidatorPool, parse_structure, validate
from crystallm_jax.evaluation.judging import judge
from crystallm_jax.evaluation.verdict import Judgement
from crystallm_jax.model import ModelConfig
from crystallm_jax.sample_run import ResultsFolder, Summary, sample_into
from crystallm_jax.samples import Sample
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.prompts import Prompt
from crystallm_jax.sampling.requests import GenerationRequest, Orders
from crystallm_jax.signals import StoppedError, StopRequest

COLUMNS = [
    "id",
    "sample",
    "file",
    "prompt",
    "spacegroup",
    "seed",
    "tokens",
    "finished",
    "log_prob",
    "rank",
    "seconds",
    "valid",
    "reasons",
    "formula_consistent",
    "multiplicity_consistent",
    "bond_length_score",
    "space_group_consistent",
    "sensible",
    "error",
    "omitted",
    "returns",
]
REQUEST = GenerationRequest(method=SamplingMethod(0.7, 5), num_samples=2, seed=11, batch_size=3)


# Samples whose structure is ordered and of elements: those that other programs take.
ORDERED = [("b-salt", 1), ("a-rutile", 1), ("a-rutile", 2), ("+c", 1)]


class Run(NamedTuple):
    """A finished run: where it is, what it was made of, what it said."""

    path: Path
    samples: dict[tuple[str, int], Sample]
    summary: Summary
    batches: list[int]


@pytest.fixture(scope="module")
def texts(fixtures: Path) -> dict[str, str]:
    """Texts as a model writes them, good and bad."""
    salt = (fixtures / "validity" / "rock_salt_raw.txt").read_text()
    assert " 1.0\n" in salt
    tokenizer = CIFTokenizer()
    return {
        "salt": salt,
        "rutile": (fixtures / "validity" / "rutile_raw.txt").read_text(),
        "corpus": tokenizer.decode(
            tokenizer.encode_cif(stream_text(preprocess_cif(next(read_corpus()).text)))
        ),
        "stretched": salt.replace("Cl Cl1 4 0.0000 0.0000 0.5000", "Cl Cl1 4 0.0000 0.0000 0.1000"),
        "disordered": salt.replace(" 1.0\n", " 0.5\n"),
        "dummy": salt.replace("Cl Cl1 4", "Q Cl1 4"),
        "cut": salt[:200],
        "nonsense": "data_Na4Cl4\nloop_ Na Fm-3m\n\n",
    }


def _prompts(texts: dict[str, str]) -> list[Prompt]:
    named = (("b-salt", "salt"), ("a-rutile", "rutile"), ("salt_2", "salt"), ("+c", "corpus"))
    prompts = [Prompt(name, texts[text].split("\n", 1)[0] + "\n") for name, text in named]
    return [*prompts[:2], Prompt("salt_2", make_prompt("Na4Cl4", "Fm-3m")), prompts[3]]


def _samples(texts: dict[str, str]) -> list[Sample]:
    """Two samples of each of four prompts, not in their order, as batches by length would come."""
    written = [
        ("salt", 0, 0),
        ("nonsense", 2, 1),
        ("rutile", 1, 0),
        ("disordered", 0, 1),
        ("cut", 2, 0),
        ("corpus", 3, 0),
        ("stretched", 1, 1),
        ("dummy", 3, 1),
    ]
    tokenizer = CIFTokenizer()
    return [
        Sample(
            prompt_index=prompt,
            sample_index=index,
            token_ids=tuple(tokenizer.encode_cif(texts[name]).tolist()),
            text=texts[name],
            log_prob=-10.123456 - n,
            finished=name != "cut",
            seconds=0.5 + n,
        )
        for n, (name, prompt, index) in enumerate(written)
    ]


def _model(batches: Sequence[Sequence[Sample] | BaseException]) -> SimpleNamespace:
    """What `sample_into` needs of a model; it writes these batches, or is interrupted."""

    def generate_batches(
        prompts: Sequence[str], request: GenerationRequest, orders: Orders
    ) -> Iterator[Sequence[Sample]]:
        for batch in batches:
            if isinstance(batch, BaseException):
                raise batch
            yield batch

    return SimpleNamespace(
        name="a stand-in",
        num_params=12,
        params={"weight": np.arange(12)},
        config=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=64),
        tokenizer=CIFTokenizer(),
        generate_batches=generate_batches,
    )


def _at_once() -> SimpleNamespace:
    """A pool that judges while one waits."""

    def judge_now(text: str) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        future.set_result(judge(text))
        return future

    return SimpleNamespace(judge=judge_now, workers=1, time_limit=60.0)


@pytest.fixture(scope="module")
def run(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("results") / "deep" / "out"
    samples, prompts, batches = _samples(texts), _prompts(texts), []
    with ValidatorPool(workers=1) as pool:
        summary = sample_into(
            ResultsFolder(path),
            _model([samples[:3], samples[3:6], samples[6:]]),
            prompts,
            REQUEST,
            pool=pool,
            on_batch=batches.append,
        )
    by_name = {(prompts[s.prompt_index].id, s.sample_index + 1): s for s in samples}
    return Run(path, by_name, summary, batches)


def _table(path: Path) -> list[dict[str, str]]:
    with (path / "samples.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_a_run_leaves_its_files_and_no_other(run: Run) -> None:
    cifs = {f"cifs/{name}__{number}.cif" for name, number in run.samples}
    symmetrized = {f"symmetrized/{name}__{number}.cif" for name, number in ORDERED}
    tables = {"samples.csv", "structures.extxyz", "run.json", "settings.json"}
    assert _names(run.path) == cifs | symmetrized | tables
    for (name, number), sample in run.samples.items():
        assert (run.path / "cifs" / f"{name}__{number}.cif").read_text() == sample.cif
    assert run.batches == [3, 3, 2]


def test_the_table_has_a_row_a_sample_in_the_order_of_the_prompts(run: Run, texts: dict[str, str]) -> None:
    prompts = {prompt.id: prompt.text.strip() for prompt in _prompts(texts)}
    rows = _table(run.path)
    assert list(rows[0]) == COLUMNS
    order = ["b-salt", "b-salt", "a-rutile", "a-rutile", "salt_2", "salt_2", "+c", "+c"]
    assert [row["id"] for row in rows] == order
    assert [row["sample"] for row in rows] == ["1", "2"] * 4
    for row in rows:
        sample = run.samples[row["id"], int(row["sample"])]
        assert (run.path / row["file"]).read_text() == sample.cif
        assert row["prompt"] == prompts[row["id"]].split("\n")[0]
        assert row["spacegroup"] == ("Fm-3m" if row["id"] == "salt_2" else "")
        assert row["seed"] == "11"
        assert float(row["seconds"]) == sample.seconds
        assert int(row["tokens"]) == len(sample.token_ids)
        assert float(row["log_prob"]) == pytest.approx(sample.log_prob, abs=6e-4)
        assert row["finished"] == str(sample.finished)


def test_the_table_holds_the_verdicts_of_the_validator(run: Run) -> None:
    for row in _table(run.path):
        report = validate(run.samples[row["id"], int(row["sample"])].cif)
        assert row["valid"] == str(report.valid)
        assert row["reasons"].split() == list(report.reasons)
        assert row["bond_length_score"] == (
            "" if report.bond_length_score is None else str(report.bond_length_score)
        )
        assert row["formula_consistent"] == (
            "" if report.formula_consistent is None else str(report.formula_consistent)
        )
        assert row["error"] == (report.error or "")
        assert bool(row["omitted"]) == ((row["id"], row["sample"]) in {("b-salt", "2"), ("+c", "2")})
    valid = {(row["id"], row["sample"]) for row in _table(run.path) if row["valid"] == "True"}
    assert {("b-salt", "1"), ("a-rutile", "1"), ("+c", "1")} <= valid
    assert not {("a-rutile", "2"), ("salt_2", "1"), ("salt_2", "2"), ("+c", "2")} & valid


def test_every_structure_is_a_frame_with_its_cell_and_composition(run: Run) -> None:
    frames = ase.io.read(run.path / "structures.extxyz", index=":", format="extxyz")
    found = [(frame.info["id"], frame.info["sample"]) for frame in frames]
    # Half occupied sites, an element Q, a cut text and nonsense are no structures that other programs could take.
    assert found == ORDERED
    for frame, name in zip(frames, found, strict=True):
        expected = parse_structure((run.path / "cifs" / f"{name[0]}__{name[1]}.cif").read_text())
        assert _counts(frame) == {k: int(v) for k, v in expected.composition.as_dict().items()}
        np.testing.assert_allclose(frame.cell.cellpar(), expected.lattice.parameters, atol=1e-5)
        assert _distances(frame.cell[:], frame.get_scaled_positions()) == pytest.approx(
            _distances(expected.lattice.matrix, expected.frac_coords), abs=1e-5
        )
        assert frame.pbc.all()
        assert frame.info["log_prob"] == pytest.approx(run.samples[name].log_prob, abs=6e-4)
        assert bool(frame.info["valid"]) == validate(run.samples[name].cif).valid


def _counts(frame: ase.Atoms) -> dict[str, int]:
    symbols = frame.get_chemical_symbols()
    return {symbol: symbols.count(symbol) for symbol in symbols}


def _distances(cell: np.ndarray, fractions: np.ndarray) -> list[float]:
    """Sorted shortest distances of all pairs, of the orthogonal cells here."""
    apart = fractions[:, None] - fractions[None]
    return np.sort(np.linalg.norm((apart - np.round(apart)) @ cell, axis=-1).ravel()).tolist()


def test_run_json_says_how_it_was_made_and_what_it_came_to(run: Run) -> None:
    written = json.loads((run.path / "run.json").read_text())
    assert written["model"] == "a stand-in"
    assert (written["parameters"], written["prompts"], written["structures"]) == (12, 4, 4)
    request = written["request"]
    assert request["method"] == {"temperature": 0.7, "top_k": 5, "top_p": None, "excluded": []}
    assert (request["num_samples"], request["seed"], request["batch_size"]) == (2, 11, 3)
    assert written["validity"]["symprec"] == 0.1
    versions = written["versions"]
    assert {"jax", "flax", "pymatgen", "spglib", "numpy", "python", "crystallm-jax"} <= versions.keys()
    assert versions["numpy"] == np.__version__
    totals, session = run.summary.totals, run.summary.session
    assert {key: written[key] for key in totals._fields} == totals._asdict()
    assert {key: written["session"][key] for key in session._fields} == session._asdict()
    assert (session.found, session.samples) == (0, 8)


def test_symmetrised_texts_are_those_of_the_structures(run: Run) -> None:
    for name, number in ORDERED:
        file = f"{name}__{number}.cif"
        structure = parse_structure((run.path / "cifs" / file).read_text())
        assert (run.path / "symmetrized" / file).read_text() == symmetrized_cif(structure, 0.1)


def test_the_summary_counts_every_sample_once(run: Run, texts: dict[str, str]) -> None:
    rows = _table(run.path)
    totals = run.summary.totals
    assert totals.samples == len(rows) == 8
    assert totals.valid == sum(row["valid"] == "True" for row in rows)
    assert totals.valid + sum(totals.reasons.values()) == 8
    assert totals.reasons["unfinished"] == 1
    assert (totals.structures, totals.symmetrized) == (4, 4)
    assert totals.generated_tokens == run.summary.session.generated_tokens
    tokenizer = CIFTokenizer()
    added = {prompt.id: len(tokenizer.encode_cif(prompt.text)) for prompt in _prompts(texts)}
    assert totals.generated_tokens == sum(int(row["tokens"]) - added[row["id"]] for row in rows)
    assert run.summary.short == ()


def test_samples_that_are_there_are_refused_and_stay_untouched(run: Run) -> None:
    before = {name: (run.path / name).read_bytes() for name in _names(run.path)}
    with pytest.raises(SamplingError, match="holds samples already; choose another --out or remove them"):
        ResultsFolder(run.path)
    assert {name: (run.path / name).read_bytes() for name in _names(run.path)} == before


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SamplingError, match="cannot be made: Not a directory"):
            ResultsFolder(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_things_is_taken(tmp_path: Path, texts: dict[str, str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model, prompts = _model([_samples(texts)[4:5]]), _prompts(texts)
    summary = sample_into(ResultsFolder(tmp_path), model, prompts, REQUEST, pool=_at_once())
    assert summary.totals[:3] == (1, 0, {"unfinished": 1})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert ase.io.read(tmp_path / "structures.extxyz", index=":", format="extxyz") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("the device is full")])
def test_an_interruption_leaves_the_cifs_and_their_table(
    tmp_path: Path, texts: dict[str, str], error: BaseException
) -> None:
    samples, prompts = _samples(texts), _prompts(texts)
    with pytest.raises(type(error)):
        sample_into(ResultsFolder(tmp_path), _model([samples[:3], error]), prompts, REQUEST, pool=_at_once())
    names = {"cifs/b-salt__1.cif", "cifs/salt_2__2.cif", "cifs/a-rutile__1.cif"}
    symmetrized = {"symmetrized/b-salt__1.cif", "symmetrized/a-rutile__1.cif"}
    kept = {"journal-0.jsonl", "settings.json", "samples.csv", "structures.extxyz"}
    assert _names(tmp_path) == names | symmetrized | kept
    rows = _table(tmp_path)
    assert [row["file"] for row in rows] == [
        "cifs/b-salt__1.cif",
        "cifs/a-rutile__1.cif",
        "cifs/salt_2__2.cif",
    ]
    assert [row["valid"] for row in rows] == ["True", "True", "False"]


def test_an_interruption_whose_exception_was_lost_ends_the_run_after_the_batch(
    tmp_path: Path, texts: dict[str, str]
) -> None:
    samples, prompts, stop = _samples(texts), _prompts(texts), StopRequest()
    model = _model([samples[:1], samples[1:3]])
    with pytest.raises(StoppedError):
        sample_into(
            ResultsFolder(tmp_path),
            model,
            prompts,
            REQUEST,
            pool=_at_once(),
            on_batch=lambda _: setattr(stop, "signal_number", signal.SIGTERM),
            stop=stop,
        )
    assert len(_table(tmp_path)) == 1


def test_a_full_disk_is_one_line_and_leaves_whole_files(
    tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_text

    def write_two(path: Path, text: str, **settings: str) -> int:
        if path.parent.name == "cifs" and len(list(path.parent.iterdir())) == 2:
            whole(path, text[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, text, **settings)

    monkeypatch.setattr(Path, "write_text", write_two)
    samples, prompts = _samples(texts), _prompts(texts)
    with pytest.raises(SamplingError, match=r"cifs/a-rutile__1\.cif: cannot be written: No space left"):
        sample_into(ResultsFolder(tmp_path), _model([samples[:3]]), prompts, REQUEST, pool=_at_once())
    cifs = {"cifs/b-salt__1.cif", "cifs/salt_2__2.cif"}
    kept = {"journal-0.jsonl", "settings.json", "samples.csv", "structures.extxyz"}
    assert _names(tmp_path) == cifs | {"symmetrized/b-salt__1.cif"} | kept
    assert (tmp_path / "cifs" / "b-salt__1.cif").read_text() == samples[0].cif
