"""Models as folders of Hugging Face's: a GPT-2 in safetensors, with its configuration and tokenizer.

`transformers` loads such a folder as `GPT2LMHeadModel` and gives the same logits. Its linear kernels are [in, out], as
ours. It has biases always: a model without them gets zeros, and `config.json` says so under `crystallm`, so that it is
read back as it was.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_jax.cif.vocabulary import TOKENS, UNK_TOKEN
from crystallm_jax.errors import ConfigError, ModelError
from crystallm_jax.files import new_folder
from crystallm_jax.model.config import DType, ModelConfig
from crystallm_jax.models.hf_tokenizer import read_json, read_vocabulary, rows_of_tokens, tokenizer_files
from crystallm_jax.models.model import Model
from crystallm_jax.models.model_folder import FloatType, check_new
from crystallm_jax.models.parameters import named_arrays, nested, parameter_value
from crystallm_jax.models.published_names import ParameterEntry, parameter_table
from crystallm_jax.models.tensors import read_tensors, write_tensors
from crystallm_jax.models.torch_file import read_torch_file

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
README_FILE = "README.md"
# What is ours in config.json.
OWN_KEY = "crystallm"
FORMAT = 1

_MODEL_TYPE = "gpt2"
_ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
_PREFIX = "transformer."
_HEAD = "lm_head.weight"
_TABLE = "transformer.wte.weight"
# Masks that older versions kept beside the parameters.
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
# What GPT-2's configuration has where its file says nothing.
_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
_DROPOUTS = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
# Settings that change the arithmetic: what our model computes, the first being GPT-2's default.
_ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}

# CrystaLLM-π's vocabularies: how many tokens, and which begins its texts. It keeps its tokenizer beside its program.
_PI = ((376, 372), (377, 372))

_HOW_TO_USE = """\
## With transformers

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
newline = tokenizer.convert_tokens_to_ids("\\n")


def ended(ids, scores, **rest):
    return (ids[:, -2:] == newline).all(dim=1)


prompt = tokenizer("data_Na4Cl4\\n", return_tensors="pt")
sample = model.generate(**prompt, do_sample=True, top_k=10, max_length=BLOCK_SIZE, stopping_criteria=[ended])
print(tokenizer.decode(sample[0]).split("\\n\\n")[0])
```

A text ends with an empty line, which is two tokens: no single token ends it, and `stop_strings` cannot be used, which
asks for a tokenizer that can write any text. `data_` begins every text, so `model.generate()` without a prompt begins
there. Padding is `<unk>`, to the left.
"""
_FENCE = "---\n"
_HUB_HEAD = "library_name: transformers\npipeline_tag: text-generation\ntags:\n- crystal-structure\n- cif\n"
_LICENCE = re.compile(r"^license: *\S+\n", re.MULTILINE)


def write_huggingface(path: str | Path, weights: Model, *, card: str, dtype: FloatType = "float32") -> None:
    """Write a folder that `transformers` loads; it appears under its name when it is complete.

    Args:
        path: the folder, which must not be there yet, or be empty.
        weights: the model; of its training nothing is kept.
        card: Markdown of `README.md`, to which is added how to use the model there. The hub does not know all that
            heads of our cards hold, and refuses some: of one, the licence is kept.
        dtype: of the parameters in the file.

    Raises:
        ModelError: the model has another vocabulary, the folder is there already, or it cannot be written.
    """
    path = Path(path)
    config = weights.config
    if config.vocab_size != len(TOKENS):
        raise ModelError(
            f"{path}: the model has {config.vocab_size} tokens; a tokenizer can be written for the"
            f" {len(TOKENS)} of the vocabulary alone"
        )
    files = {
        CONFIG_FILE: _config_of(config, dtype),
        GENERATION_FILE: {**_token_ids(), "max_length": config.block_size},
        **tokenizer_files(config.block_size),
    }
    check_new(path)
    with new_folder(path, ModelError) as partial:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (partial / README_FILE).write_text(_readme(card, config.block_size), "utf-8")
        # The library of `transformers` asks for the framework that wrote it, and knows this one.
        write_tensors(
            partial / WEIGHTS_FILE,
            dict(_tensors_of(weights, dtype, place=str(path))),
            metadata={"format": "pt"},
        )


def _config_of(config: ModelConfig, dtype: FloatType) -> dict[str, Any]:
    """The content of `config.json`."""
    return {
        "architectures": [_ARCHITECTURES[0]],
        "model_type": _MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout_rate,
        "initializer_range": 0.02,
        "use_cache": True,
        **{key: values[0] for key, values in _ARITHMETIC.items() if values[0] is not None},
        **_token_ids(),
        "torch_dtype": dtype,
        # What transformers has no setting for: whether there are biases, and the arithmetic of the blocks.
        OWN_KEY: {"format": FORMAT, "bias": config.bias, "dtype": config.dtype},
    }


def _token_ids() -> dict[str, int | None]:
    """Texts begin with `data_`; no single token ends them."""
    return {
        "bos_token_id": TOKENS.index("data_"),
        "eos_token_id": None,
        "pad_token_id": TOKENS.index(UNK_TOKEN),
    }


def _readme(card: str, block_size: int) -> str:
    """The card behind a head that the hub understands: of the card's own head it takes the licence alone."""
    head, text = "", card
    if card.startswith(_FENCE):
        head, _, text = card.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    licence = _LICENCE.search(f"{head}\n")
    use = _HOW_TO_USE.replace("BLOCK_SIZE", str(block_size))
    return f"{_FENCE}{licence[0] if licence else ''}{_HUB_HEAD}{_FENCE}\n{text.strip()}\n\n{use}"


def _tensors_of(weights: Model, dtype: FloatType, *, place: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under their names in `transformers`; zeros for biases that the model does not have."""
    named = named_arrays(weights.params, weights.config)
    for name, entry in _table(weights.config).items():
        value = named.get(".".join(entry.path), np.zeros(entry.shape))
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(value, dtype)
        if not np.isfinite(stored).all():
            raise ModelError(
                f"{place}: tensor {name} holds numbers that are not finite in {dtype}: store it as float32"
            )
        yield name, stored


def _table(config: ModelConfig) -> dict[str, ParameterEntry]:
    """What `transformers` calls each parameter: as published, with biases."""
    return parameter_table(replace(config, bias=True))


def read_huggingface(path: str | Path) -> Model:
    """Read a GPT-2 of Hugging Face's whose vocabulary holds this package's; every tensor is checked by name and shape.

    Its embeddings are brought into the order of this package's tokens.

    Raises:
        ModelError: a file is missing or damaged, a tensor missing, left over or of another shape; it computes
            something else, or its vocabulary lacks a token or has one that texts are written with.
    """
    path = Path(path)
    place = str(path)
    settings = read_json(path / CONFIG_FILE)
    if settings.get("model_type") != _MODEL_TYPE:
        raise ModelError(
            f"{place}: model_type={settings.get('model_type')!r} in {CONFIG_FILE}; only {_MODEL_TYPE!r} is known"
        )
    shape = _shape_in(settings, place)
    tensors = _own_names(_read_tensors(path))
    if shape.n_layer > len(tensors):
        raise ModelError(
            f"{place}: {len(tensors)} tensors are too few for the {shape.n_layer} layers that it states"
        )
    table = _table(shape)
    _check_architecture(settings, sorted(tensors.keys() - table.keys() - {_HEAD}), place)
    named = _arranged(tensors, table, place)
    if _HEAD in tensors and not np.array_equal(tensors[_HEAD], tensors[_TABLE]):
        raise ModelError(f"{place}: {_HEAD} is not {_TABLE}: only models whose head is tied are known")
    rows = _rows(path, settings, shape.vocab_size)
    named["wte.embedding"] = named["wte.embedding"][rows]
    bias = _has_bias(settings, named, place)
    config = replace(shape, vocab_size=len(rows), bias=bias, dtype=_arithmetic(settings))
    params = nested({name: value for name, value in named.items() if bias or not name.endswith(".bias")})
    return Model(config, params)


def _shape_in(settings: Mapping[str, Any], place: str) -> ModelConfig:
    """The shape that `config.json` states, with biases, where what it computes is what our model computes."""
    place = f"{place}: {CONFIG_FILE}"
    values = {key: settings.get(key, default) for key, default in _SHAPE.items()}
    for key, value in values.items():
        if type(value) is not int:
            raise ModelError(f"{place}: {key}={value!r} is not a whole number")
    for key, known in _ARITHMETIC.items():
        if settings.get(key, known[0]) not in known:
            raise ModelError(f"{place}: {key}={settings[key]!r} is not supported; only {known[0]!r} is")
    if settings.get("n_inner") not in (None, 4 * values["n_embd"]):
        raise ModelError(f"{place}: n_inner={settings['n_inner']!r} is not supported; only 4 n_embd is")
    residual, embedding, attention = (settings.get(key, rate) for key, rate in _DROPOUTS.items())
    if embedding != residual:
        logger.info(
            "%s: embd_pdrop=%s: one rate is kept for both, resid_pdrop=%s", place, embedding, residual
        )
    try:
        return ModelConfig(
            n_layer=values["n_layer"],
            n_head=values["n_head"],
            n_embd=values["n_embd"],
            block_size=values["n_positions"],
            vocab_size=values["vocab_size"],
            bias=True,
            dropout=float(residual),
            attention_dropout=None if attention == residual else float(attention),
        )
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{place}: cannot be used: {error}") from None


def _check_architecture(settings: Mapping[str, Any], left: list[str], place: str) -> None:
    stated = settings.get("architectures")
    unknown = [name for name in stated if name not in _ARCHITECTURES] if isinstance(stated, list) else []
    if unknown or left:
        which = (
            f"its architecture is {unknown[0]}, which is more than a GPT-2"
            if unknown
            else "more than a GPT-2"
        )
        names = f"{', '.join(left[:4])}{f' and {len(left) - 4} more' if len(left) > 4 else ''}"
        raise ModelError(
            f"{place}: {which}; conditional models are not supported; tensors that no parameter takes:"
            f" {names or 'none'}"
        )


def _own_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the names of `GPT2LMHeadModel`, also of a bare `GPT2Model`; without masks."""
    bare = not any(name.startswith(_PREFIX) for name in tensors)
    full = {
        name if not bare or name == _HEAD else f"{_PREFIX}{name}": value for name, value in tensors.items()
    }
    return {name: value for name, value in full.items() if not _BUFFER.fullmatch(name)}


def _arranged(
    tensors: Mapping[str, np.ndarray], table: Mapping[str, ParameterEntry], place: str
) -> dict[str, np.ndarray]:
    """Tensors as float32 under our names, in the shapes of memory."""
    named = {}
    for name, entry in table.items():
        if name not in tensors:
            raise ModelError(f"{place}: tensor {name} is missing")
        value = parameter_value(tensors[name], entry, what=f"{place}: tensor {name}")
        named[".".join(entry.path)] = value
    return named


def _rows(path: Path, settings: Mapping[str, Any], count: int) -> np.ndarray:
    """The row of the embeddings of each of our tokens."""
    vocabulary = read_vocabulary(path)
    if vocabulary is not None:
        return rows_of_tokens(vocabulary, count, place=str(path))
    if count != len(TOKENS):
        known = (
            "; it is the size of CrystaLLM-π's, whose texts put each value in brackets, which this package's never do"
            if (count, settings.get("bos_token_id")) in _PI
            else ": put its tokenizer.json or vocabulary.json there"
        )
        raise ModelError(
            f"{path}: no tokenizer in the folder, and vocab_size={count} is not this package's {len(TOKENS)}, so that"
            f" no row is known to be a token's{known}"
        )
    logger.warning(
        "%s: no tokenizer in the folder; its %d rows are taken for this package's tokens", path, count
    )
    return np.arange(count)


def _has_bias(settings: Mapping[str, Any], named: Mapping[str, np.ndarray], place: str) -> bool:
    """Whether the model has biases: one that we wrote without has zeros, unless it was trained since."""
    own = settings.get(OWN_KEY)
    if not isinstance(own, Mapping) or own.get("bias") is not False:
        return True
    trained = any(value.any() for name, value in named.items() if name.endswith(".bias"))
    if trained:
        logger.warning("%s: its biases are not zero any more: they are kept", place)
    return trained


def _arithmetic(settings: Mapping[str, Any]) -> DType:
    """Of the blocks, as we wrote it; of other models float32."""
    own = settings.get(OWN_KEY)
    stated = own.get("dtype") if isinstance(own, Mapping) else None
    return "bfloat16" if stated == "bfloat16" else "float32"


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder: of safetensors, or of a pickle where there are none."""
    for name in (WEIGHTS_FILE, PICKLE_FILE):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return _read_file(path / name)
        if index.is_file():
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, Mapping) or not all(map(_is_plain, parts.values())):
                raise ModelError(f"{index}: its weight_map is no table of tensors and files of this folder")
            tensors: dict[str, np.ndarray] = {}
            for part in sorted(set(parts.values())):
                tensors |= _read_file(path / part)
            return tensors
    raise ModelError(f"{path}: no {WEIGHTS_FILE} there, nor {PICKLE_FILE}")


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and "\\" not in name


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix != ".safetensors":
        saved = read_torch_file(path)
        if not isinstance(saved, dict) or not all(isinstance(value, np.ndarray) for value in saved.values()):
            raise ModelError(f"{path}: not a table of tensors")
        return {str(name): value for name, value in saved.items()}
    return read_tensors(path)
