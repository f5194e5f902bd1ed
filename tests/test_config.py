"""Configuration: what a user types becomes a checked dataclass or one clear line."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from crystallm_jax.config import find_config, load_config, to_yaml
from crystallm_jax.errors import ConfigError
from crystallm_jax.model import ModelConfig, count_params, init_params
from crystallm_jax.train_run.train_config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@dataclass(frozen=True)
class Schema:
    n_layer: int = 2
    rate: float = 0.5
    bias: bool = False
    name: str = ""
    cap: float | None = None


def _refused(*overrides: str, path: Path | None = None, schema: type = TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("n_layer: 5\nrate: 0.25\nname: from the file\n")
    assert load_config(Schema) == Schema()
    assert load_config(Schema, file, ["rate=1e-3"]) == Schema(n_layer=5, rate=1e-3, name="from the file")


def test_later_overrides_win() -> None:
    assert load_config(Schema, None, ["n_layer=3", "n_layer=4"]).n_layer == 4


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("rate=3", "rate", 3.0),
        ("--n_layer=7", "n_layer", 7),
        ("name=a=b", "name", "a=b"),
        ("name=12", "name", "12"),
        ("name=/some where/else", "name", "/some where/else"),
        ("cap=null", "cap", None),
        ("cap=0.1", "cap", 0.1),
    ],
)
def test_values_take_the_type_of_their_key(text: str, field: str, value: object) -> None:
    found = getattr(load_config(Schema, None, [text]), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["False", "false", "'False'", "no", "off", "0", "FALSE"])
def test_what_reads_as_false_is_false(text: str) -> None:
    assert load_config(Schema, None, ["bias=true", f"bias={text}"]).bias is False


@pytest.mark.parametrize("text", ["True", "true", "'True'", "yes", "on", "1"])
def test_what_reads_as_true_is_true(text: str) -> None:
    assert load_config(Schema, None, [f"bias={text}"]).bias is True


@pytest.mark.parametrize("text", ["3", "-1", "'3'", "0.5", "maybe", "", "null", "[true]", "{a: true}"])
def test_what_is_no_truth_value_is_refused(text: str) -> None:
    message = _refused(f"bias={text}", schema=Schema)
    assert message.startswith("bias")
    assert "the command line" in message


def test_a_truth_value_in_a_file_is_checked_alike(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("bias: 'False'\n")
    assert load_config(TrainConfig, file).bias is False
    file.write_text("bias: 2\n")
    assert str(file) in _refused(path=file)


def test_an_unknown_key_is_refused_with_the_likely_one() -> None:
    message = _refused("n_layers=3")
    assert "'n_layers'" in message
    assert "did you mean 'n_layer'" in message


def test_an_unknown_key_like_none_is_refused_with_all_of_them() -> None:
    message = _refused("zzz=3", schema=Schema)
    assert all(field.name in message for field in dataclasses.fields(Schema))


def test_an_unknown_key_in_a_file_is_refused_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_sise: 3\n")
    message = _refused(path=file)
    assert str(file) in message
    assert "'batch_size'" in message


@pytest.mark.parametrize(
    ("text", "key", "wanted"),
    [
        ("batch_size=2.5", "batch_size", "int"),
        ("batch_size=true", "batch_size", "int"),
        ("batch_size=many", "batch_size", "int"),
        ("batch_size=null", "batch_size", "int"),
        ("n_layer=[1]", "n_layer", "int"),
        ("learning_rate=fast", "learning_rate", "float"),
        ("learning_rate=true", "learning_rate", "float"),
        ("dataset=null", "dataset", "str"),
        ("attention_dropout=some", "attention_dropout", "float | None"),
        ("dtype=float16", "dtype", "bfloat16"),
        ("windows=nowhere", "windows", "anywhere"),
        ("attention=flash", "attention", "xla"),
        ("n_layer=${nothing}", "n_layer", "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_expected(text: str, key: str, wanted: str) -> None:
    message = _refused(text)
    assert key in message
    assert wanted in message


@pytest.mark.parametrize("text", ["n_layer", "=3", "", " = 3"])
def test_what_has_no_key_or_no_equals_sign_is_refused(text: str) -> None:
    assert "key=value" in _refused(text)


@pytest.mark.parametrize("text", ["n_layer=[1", "name=*a", "name={a"])
def test_an_override_that_is_no_yaml_is_refused(text: str) -> None:
    assert repr(text) in _refused(text, schema=Schema)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\xfe\x80",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"dataset: \xe9",
        b"- a\n- b\n",
        b"just words",
        b"42",
        b"n_layer: [1\nbias: }",
        b"n_layer: 4\nn_layer: 5\n",
        b"n_layer: *nowhere",
        b"1: 2\n",
        b"n_layer:",
    ],
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "junk.yaml"
    file.write_bytes(content)
    assert str(file) in _refused(path=file)


def test_a_file_cannot_name_code_to_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    file = tmp_path / "hostile.yaml"
    file.write_text(f"n_layer: !!python/object/apply:os.mkdir ['{trap}']\n")
    assert str(file) in _refused(path=file)
    assert not trap.exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such configuration file" in _refused(path=tmp_path / "none.yaml")
    assert str(tmp_path) in _refused(path=tmp_path)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.touch()
    assert load_config(TrainConfig, file) == TrainConfig()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = TrainConfig(
        dataset="a b: c", bias=True, attention_dropout=0.25, learning_rate=3e-4, dtype="float32"
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(TrainConfig, file) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert config.model_config(371).block_size == config.block_size
    assert (
        config.tokens_per_step == config.gradient_accumulation_steps * config.batch_size * config.block_size
    )


@pytest.mark.parametrize(("name", "count"), [("small", 25_888_768), ("large", 203_837_440)])
def test_the_published_models_have_as_many_parameters_as_published(name: str, count: int) -> None:
    model = load_config(TrainConfig, find_config(name)).model_config(371)
    assert count_params(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))) == count


def test_a_configuration_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    assert find_config("small") == find_config("small.yaml")
    assert (
        find_config("small").read_text()
        == CONFIGS[[path.stem for path in CONFIGS].index("small")].read_text()
    )
    file = tmp_path / "mine.yaml"
    file.touch()
    assert find_config(file) == file


@pytest.mark.parametrize("name", ["nope", "", "."])
def test_a_name_that_no_configuration_has_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    assert all(path.stem in str(caught.value) for path in CONFIGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_iters", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("eval_interval", 0),
        ("log_interval", 0),
        ("keep_checkpoints", 0),
        ("checkpoint_interval", -1),
        ("eval_iters_train", -1),
        ("eval_iters_val", -1),
        ("warmup_iters", -1),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("min_lr", math.inf),
        ("weight_decay", -0.1),
        ("grad_clip", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("lr_decay_iters", 2000),
        ("underrep_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_training_setting_out_of_range_is_refused(key: str, value: float) -> None:
    assert f"{key}=" in _refused(f"{key}={value}")


def test_without_a_schedule_its_length_does_not_matter() -> None:
    assert load_config(TrainConfig, None, ["decay_lr=false", "lr_decay_iters=1"]).lr_decay_iters == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_layer": 0}, "n_layer=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"n_embd": 33, "n_head": 8}, "n_embd=33"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
    ],
)
def test_an_impossible_model_is_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig(**settings)


def test_attention_dropout_follows_dropout_unless_it_is_set() -> None:
    assert ModelConfig(dropout=0.3).attention_dropout_rate == 0.3
    assert ModelConfig(dropout=0.3, attention_dropout=0.0).attention_dropout_rate == 0.0


@pytest.mark.parametrize(
    ("text", "expected"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'off'", "off"), ("false", "off")]
)
def test_on_and_off_need_no_quotes(text: str, expected: str, tmp_path: Path) -> None:
    config = load_config(TrainConfig, overrides=[f"distributed={text}"])
    assert config.distributed == expected
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(TrainConfig, tmp_path / "again.yaml") == config
