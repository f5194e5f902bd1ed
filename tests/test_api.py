"""The Python interface: what the names of the package do, and what they say when they cannot."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import crystallm_jax as cl
from crystallm_jax.config import to_yaml
from crystallm_jax.model import ModelConfig
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import write_folder
from crystallm_jax.train_run.names import CHECKPOINTS_FOLDER, CONFIG_FILE
from crystallm_jax.train_run.train_config import TrainConfig
from crystallm_jax.training.checkpoint import Checkpoints
from crystallm_jax.training.sharding import make_mesh
from crystallm_jax.training.step import compile_steps, initial_state

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)
SHAPE = "n_layer: 2\nn_head: 2\nn_embd: 32\nblock_size: 64\nbatch_size: 1\n"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> cl.CrystalModel:
    return cl.new_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def folder(model: cl.CrystalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder."""
    path = tmp_path_factory.mktemp("models") / "folder"
    write_folder(path, Model(model.config, model.params))
    return path


@pytest.fixture(scope="module")
def run_folder(model: cl.CrystalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run whose only checkpoint holds the model; trained with dropout and in bfloat16."""
    path = tmp_path_factory.mktemp("models") / "run"
    config = TrainConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, batch_size=1, dropout=0.1)
    model_config = config.model_config(CONFIG.vocab_size)
    steps = compile_steps(config, model_config, make_mesh(1, 1, jax.devices()[:1]))
    state = initial_state(config, model_config, steps, model.params)
    with Checkpoints(path / CHECKPOINTS_FOLDER, keep=1) as checkpoints:
        description = {"vocab_size": CONFIG.vocab_size}
        checkpoints.save(state, step=7, data_state={}, description=description, val_loss=None)
        checkpoints.wait()
    (path / CONFIG_FILE).write_text(to_yaml(config))
    return path


@pytest.fixture(scope="module")
def rock_salt(fixtures: Path) -> str:
    """A text as a good model writes it."""
    return (fixtures / "validity" / "rock_salt_raw.txt").read_text()


def _sample(text: str) -> cl.Sample:
    ids = tuple(cl.CIFTokenizer().encode_cif(text).tolist())
    return cl.Sample(prompt_index=0, sample_index=0, token_ids=ids, text=text, log_prob=-1.0, finished=True)


def _same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# The package.


def test_every_public_name_is_there() -> None:
    assert set(cl.__all__) <= set(dir(cl))
    for name in cl.__all__:
        assert getattr(cl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = cl.absent


def test_the_contracts_signatures() -> None:
    def takes(function: Any, *names: str) -> bool:
        return list(inspect.signature(function).parameters)[: len(names)] == list(names)

    assert takes(cl.symmetrized_cif, "structure", "symprec")
    assert takes(cl.preprocess_cif, "text", "decimal_places", "oxidation_states")
    assert takes(cl.make_prompt, "composition", "spacegroup")
    assert takes(cl.match, "generated", "true")
    assert takes(cl.new_model, "config", "seed")
    generate = inspect.signature(cl.CrystalModel.generate).parameters
    defaults = {name: generate[name].default for name in list(generate)[2:9]}
    assert list(generate)[1] == "prompts"
    assert list(defaults.items()) == [
        ("num_samples", 1),
        ("temperature", 1.0),
        ("top_k", 10),
        ("max_new_tokens", None),
        ("seed", 0),
        ("batch_size", None),
        ("constrain", None),
    ]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import crystallm_jax", {"jax", "pymatgen", "numpy"}),
        ("from crystallm_jax import CIFTokenizer, make_prompt, stream_text", {"jax", "pymatgen"}),
        ("import crystallm_jax.cif, crystallm_jax.evaluation", {"jax", "pymatgen"}),
        ("import crystallm_jax.data, crystallm_jax.data.prepare", {"jax", "grain"}),
        ("from crystallm_jax import validate, match, preprocess_cif", {"jax", "flax"}),
    ],
)
def test_people_without_an_accelerator_load_no_jax(statement: str, absent: set[str]) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    code = f"import sys; {statement}; print(*({absent!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == []


# Models.


def test_a_new_model_is_a_function_of_its_configuration_and_seed(
    model: cl.CrystalModel, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{SHAPE}dtype: bfloat16\n")
    again = cl.new_model(path, seed=3)
    assert again.config == CONFIG
    assert _same(again.params, model.params)
    assert not _same(cl.new_model(CONFIG, seed=4).params, model.params)
    assert again.num_params == 371 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32


def test_configurations_are_found_by_name_or_refused() -> None:
    with pytest.raises(cl.ConfigError, match=r"no such file; configurations by name are .*small.*tiny"):
        cl.new_model("gigantic")


@pytest.mark.parametrize("kind", ["folder", "run_folder"])
def test_a_loaded_model_is_the_one_that_was_saved(
    kind: str, model: cl.CrystalModel, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    loaded = cl.load_model(path)
    assert _same(loaded.params, model.params)
    # Dropout and reduced precision are for training.
    assert loaded.config == model.config
    assert loaded.name == str(path)
    assert cl.load_model(path, dtype="bfloat16").config.dtype == "bfloat16"


def test_half_precision_files_load_as_float32(model: cl.CrystalModel, tmp_path: Path) -> None:
    write_folder(tmp_path, Model(model.config, model.params), dtype="float16")
    loaded = cl.load_model(tmp_path)
    for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float16).astype(np.float32))


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_golden_checkpoints_load(golden: Path, name: str) -> None:
    recorded = np.load(golden / "model" / name / "logits.npz")
    model = cl.load_model(golden / "model" / name / "ckpt.pt")
    np.testing.assert_allclose(model.logits(recorded["input_ids"]), recorded["logits"], atol=1e-5, rtol=0)
    assert model.config.dropout == 0


def test_nothing_there_says_what_was_expected(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(
            cl.ModelError, match=r"no model there; expected a file \(ckpt\.pt, model\.npz\), a folder"
        ):
            cl.load_model(path)


def test_damaged_models_are_refused(folder: Path, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"\x80\x02junk")
    with pytest.raises(cl.ModelError, match="not a PyTorch checkpoint"):
        cl.load_model(tmp_path / "ckpt.pt")
    short = shutil.copytree(folder, tmp_path / "short")
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(cl.ModelError, match="damaged"):
        cl.load_model(short)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / CONFIG_FILE).write_text((other / CONFIG_FILE).read_text().replace("n_embd: 32", "n_embd: 64"))
    with pytest.raises(cl.ModelError, match=r"shape \(371, 32\); the configuration asks for \(371, 64\)"):
        cl.load_model(other)
    deeper = shutil.copytree(run_folder, tmp_path / "deeper")
    text = (deeper / CONFIG_FILE).read_text()
    (deeper / CONFIG_FILE).write_text(text.replace("n_layer: 2", "n_layer: 3"))
    with pytest.raises(cl.ModelError, match=r"h_2.* is missing") as caught:
        cl.load_model(deeper)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS_FOLDER).mkdir()
    (tmp_path / CONFIG_FILE).write_text(SHAPE)
    with pytest.raises(cl.ModelError, match="no complete checkpoint"):
        cl.load_model(tmp_path)


# Logits.


def test_logits_are_float32_and_causal(model: cl.CrystalModel) -> None:
    tokens = np.arange(20).reshape(2, 10)
    logits = model.logits(tokens)
    assert (logits.shape, logits.dtype) == ((2, 10, 371), np.float32)
    changed = tokens.copy()
    changed[:, 6:] = 99
    np.testing.assert_allclose(model.logits(changed)[:, :6], logits[:, :6], atol=1e-6)
    np.testing.assert_array_equal(model.logits(tokens.tolist()), logits)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"shape \(3,\)"),
        ([[1.0, 2.0]], "float64"),
        ([[True]], "bool"),
        ([[0] * 65], "65 tokens do not fit the context of 64"),
        ([[371]], "within 0 and 370"),
        ([[-1]], "within 0 and 370"),
    ],
)
def test_logits_refuse_what_is_no_batch_of_tokens(model: cl.CrystalModel, tokens: Any, message: str) -> None:
    with pytest.raises(cl.ModelError, match=message):
        model.logits(tokens)


# Samples.


def test_samples_come_in_order_with_their_prompts(model: cl.CrystalModel) -> None:
    prompts = [cl.make_prompt("Ti2O4"), "data_", cl.make_prompt("Na4Cl4")]
    samples = model.generate(prompts, num_samples=2, max_new_tokens=4, seed=1)
    assert [(s.prompt_index, s.sample_index) for s in samples] == [(i, j) for i in range(3) for j in (0, 1)]
    for sample in samples:
        prompt = prompts[sample.prompt_index]
        assert sample.text.startswith(prompt)
        assert list(sample.token_ids)[:-4] == model.tokenizer.encode_cif(prompt).tolist()
        assert sample.text == model.tokenizer.decode(sample.token_ids)
        assert sample.log_prob < 0
        assert not sample.finished


def test_one_prompt_may_stand_alone_and_none_gives_none(model: cl.CrystalModel) -> None:
    settings = {"num_samples": 6, "max_new_tokens": 4, "seed": 1}
    alone = model.generate("data_Na4Cl4\n", **settings)
    listed = model.generate(["data_Na4Cl4\n"], **settings)
    assert alone == listed
    assert len({sample.token_ids for sample in alone}) == 6
    assert model.generate([]) == []


def test_batch_sizes_change_nothing(model: cl.CrystalModel) -> None:
    settings = {"num_samples": 6, "max_new_tokens": 4, "seed": 1}
    whole = model.generate("data_Na4Cl4\n", **settings)
    in_threes = model.generate("data_Na4Cl4\n", batch_size=3, **settings)
    assert [s.text for s in whole] == [s.text for s in in_threes]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": "Na4Cl4"}, "does not begin with data_: make it with make_prompt"),
        ({"prompts": ""}, "does not begin with data_"),
        ({"prompts": ["data_Na4Cl4\n", "data_Na4§4\n"]}, "characters that the vocabulary lacks"),
        ({"prompts": "data_Qq4\n"}, "words or characters that the vocabulary lacks"),
        ({"prompts": "data_<unk>"}, "words or characters that the vocabulary lacks"),
        ({"prompts": "data_" + "Na" * 64}, "context takes 1 to 64"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"overflow": "wrap"}, "overflow='wrap'"),
        ({"constrain": "composition"}, "65 tokens is too small for Na4Cl4"),
        ({"constrain": "grammar"}, "constrain='grammar'"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    model: cl.CrystalModel, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(cl.SamplingError, match=message):
        model.generate(**{"prompts": "data_Na4Cl4\n", **wrong})


def test_a_sample_becomes_an_ordinary_cif(rock_salt: str) -> None:
    sample = _sample(rock_salt)
    assert sample.cif == cl.postprocess_cif(rock_salt)
    assert sample.cif.count("\n  ") == 192
    assert "_atom_type_electronegativity" not in sample.cif
    structure = sample.structure()
    assert structure.composition.formula == "Na4 Cl4"
    assert structure.lattice.abc == pytest.approx((5.6402,) * 3)
    assert sample.validate() == cl.validate(sample.cif)
    assert sample.validate().valid


@pytest.mark.parametrize(
    "text", ["data_Na4Cl4\n", "data_\n\n", "data_Na4Cl4\n_symmetry_space_group_name_H-M Na\n"]
)
def test_what_is_no_crystal_stands_under_a_warning_and_is_not_valid(text: str) -> None:
    sample = _sample(text)
    first, rest = sample.cif.split("\n", 1)
    assert first.startswith("# WARNING")
    assert rest == text
    with pytest.raises(cl.CIFError):
        sample.structure()
    report = sample.validate()
    assert not report.valid
    assert report.reasons
