"""Hugging Face's folders: what is written is what `transformers` computes and tokenises, and is read again."""

import dataclasses
import gzip
import itertools
import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from crystallm_jax.cif import SPACEGROUPS, CIFTokenizer
from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.errors import ModelError
from crystallm_jax.model import GPT, ModelConfig
from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.hf_tokenizer import tokenizer_files
from crystallm_jax.models.huggingface import read_huggingface, write_huggingface
from crystallm_jax.models.model import Model
from crystallm_jax.models.parameters import flattened, params_from_named
from crystallm_jax.models.published import read_published
from crystallm_jax.models.published_names import parameter_table

PLAIN = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, dropout=0.1, attention_dropout=0.2)
BIASED = dataclasses.replace(PLAIN, bias=True)
OURS = CIFTokenizer()
TAG = "_symmetry_space_group_name_H-M"
PI = ("<pad>", "<bos>", "<eos>", "[", "]", "<prop>")


def _weights(config: ModelConfig) -> Model:
    rng = np.random.default_rng(0)
    named = {
        ".".join(entry.path): rng.normal(0, 0.3, entry.shape) + (entry.path[-1] == "scale")
        for entry in parameter_table(config).values()
    }
    return Model(config, params_from_named(named, config, place="here"))


def _equal(one: Model, other: Model) -> bool:
    first, second = flattened(one.params), flattened(other.params)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_huggingface(tmp_path / "model", _weights(BIASED), card="# A model")
    return tmp_path / "model"


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def _edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_huggingface(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


# Out and in again


@pytest.mark.parametrize("config", [PLAIN, BIASED, dataclasses.replace(PLAIN, dtype="bfloat16")])
def test_a_model_comes_back_as_it_was(config: ModelConfig, tmp_path: Path) -> None:
    weights = _weights(config)
    write_huggingface(tmp_path / "model", weights, card="# A model")
    read = read_huggingface(tmp_path / "model")
    assert read.config == config
    assert _equal(read, weights)
    assert not list(tmp_path.glob("*.partial"))


def test_numbers_that_a_type_cannot_hold_are_not_written(tmp_path: Path) -> None:
    weights = _weights(PLAIN)
    weights.params["ln_f"]["scale"][0] = 1e6
    with pytest.raises(ModelError, match="not finite in float16"):
        write_huggingface(tmp_path / "model", weights, card="", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_the_size_costs_rounding_alone(dtype: Any, bits: int, tmp_path: Path) -> None:
    weights = _weights(PLAIN)
    write_huggingface(tmp_path / "model", weights, card="", dtype=dtype)
    read = flattened(read_huggingface(tmp_path / "model").params)
    for name, value in flattened(weights.params).items():
        assert read[name].dtype == np.float32
        np.testing.assert_allclose(read[name], value, rtol=2.0**-bits, atol=1e-6, err_msg=name)


def test_the_card_keeps_its_licence_and_says_how_to_use_the_model(tmp_path: Path) -> None:
    card = ModelCard(license="cc-by-4.0", metrics={"val_loss": 0.3}, text="# Salts\n\nOf salt.").to_markdown()
    write_huggingface(tmp_path / "model", _weights(PLAIN), card=card)
    readme = (tmp_path / "model" / "README.md").read_text()
    head, text = readme.removeprefix("---\n").split("\n---\n")
    assert head.startswith("license: cc-by-4.0\nlibrary_name: transformers")
    assert "metrics" not in head
    assert text.startswith("\n# Salts")
    assert "max_length=16" in text


def test_what_is_there_already_is_not_written_over(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="is there already"):
        write_huggingface(folder, _weights(PLAIN), card="")
    assert (folder / "model.safetensors").read_bytes() == before


def test_another_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, vocab_size=11)
    with pytest.raises(ModelError, match="the model has 11 tokens"):
        write_huggingface(tmp_path / "model", _weights(config), card="")


def test_biases_that_were_trained_since_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_huggingface(tmp_path / "model", _weights(PLAIN), card="")
    _edit_tensors(tmp_path / "model", lambda tensors: tensors["transformer.ln_f.bias"].__setitem__(0, 1.0))
    read = read_huggingface(tmp_path / "model")
    assert read.config == BIASED
    assert read.params["ln_f"]["bias"][0] == 1
    assert "not zero any more" in caplog.text


# As other programs write them


def test_names_without_their_prefix_masks_and_a_second_head_are_read(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        tensors["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)

    _edit_tensors(folder, change)
    assert _equal(read_huggingface(folder), _weights(BIASED))


def test_shards_are_read_together(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, own in parts.items() for name in own}}))
    assert _equal(read_huggingface(folder), _weights(BIASED))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: no such file" in _refused(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../model.safetensors"}}))
    assert "no table of tensors and files of this folder" in _refused(folder)
    index.unlink()
    assert "no model.safetensors there, nor pytorch_model.bin" in _refused(folder)


def test_pickled_weights_are_read_without_executing_them(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert _equal(read_huggingface(folder), _weights(BIASED))
    torch.save({"callable": print}, folder / "pytorch_model.bin")
    assert "refused" in _refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 40),
        ("n_layer", "2"),
        ("n_head", 3),
        ("resid_pdrop", "much"),
        ("n_layer", 10**9),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_would_compute_something_else_is_refused(key: str, value: Any, folder: Path) -> None:
    _edit(folder / "config.json", **{key: value})
    message = _refused(folder)
    assert (
        key in message
        or "too few for the 1000000000 layers" in message
        or "n_head=3" in message
        or "much" in message
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("transformer.ln_f.bias"), "tensor transformer.ln_f.bias is missing"),
        (lambda tensors: tensors.update({"transformer.ln_f.bias": np.zeros(9)}), r"has shape (9,)"),
        (lambda tensors: tensors.update({"transformer.h.2.x": np.zeros(1)}), "transformer.h.2.x"),
        (
            lambda tensors: tensors.update({"lm_head.weight": np.zeros((371, 8))}),
            "only models whose head is tied",
        ),
        (lambda tensors: tensors["transformer.ln_f.bias"].__setitem__(0, np.inf), "not finite"),
        (lambda tensors: tensors.update({"transformer.ln_f.bias": np.zeros(8, np.int8)}), "is of int8"),
    ],
)
def test_tensors_are_those_of_the_model_and_no_others(
    change: Callable[[dict[str, np.ndarray]], Any], said: str, folder: Path
) -> None:
    _edit_tensors(folder, change)
    assert said in _refused(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"model_type": "gpt2", "resid_pdrop": 1%s}' % (b"0" * 400)),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "1"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 1, "b": 1}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": ["b"], "id": 1}]}'),
        ("model.safetensors", b"garbage and more of it"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    assert name in _refused(folder)


def test_conditional_models_are_refused_by_what_they_have_more(folder: Path) -> None:
    _edit(folder / "config.json", architectures=["PKVGPT"], n_prefix_tokens=2)
    _edit_tensors(folder, lambda tensors: tensors.update({"conditioning.to_kv.weight": np.zeros((4, 4))}))
    message = _refused(folder)
    assert "PKVGPT" in message
    assert "conditioning.to_kv.weight" in message


# Vocabularies


def _speaking(folder: Path, tokens: list[str], rows: int | None = None) -> np.ndarray:
    """Give the folder another vocabulary, and a row of its own for each token: what was there, in our order."""
    rows = rows or len(tokens)
    table = np.random.default_rng(1).normal(size=(rows, 8)).astype(np.float32)
    _edit_tensors(folder, lambda tensors: tensors.update({"transformer.wte.weight": table}))
    _edit(folder / "config.json", vocab_size=rows)
    (folder / "tokenizer.json").unlink()
    (folder / "vocabulary.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    known = [token for token in TOKENS if token in tokens]
    return table[[tokens.index(token) for token in known]]


def test_tokens_in_another_order_are_put_in_ours(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = _speaking(folder, list(reversed(TOKENS)))
    read = read_huggingface(folder)
    np.testing.assert_array_equal(read.params["wte"]["embedding"], expected)
    assert caplog.text == ""


def test_markers_and_padding_are_dropped_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = _speaking(folder, ["<bos>", *TOKENS, "[PAD]"], rows=384)
    read = read_huggingface(folder)
    assert read.config == BIASED
    np.testing.assert_array_equal(read.params["wte"]["embedding"], expected)
    assert "dropped the tokens '<bos>', '[PAD]'" in caplog.text
    assert "dropped 11 rows" in caplog.text


def test_tokens_that_the_model_has_no_rows_for_do_not_matter(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _speaking(folder, list(TOKENS))
    _edit(folder / "vocabulary.json", **{"<pad>": 371, "[": 372})
    assert read_huggingface(folder).config == BIASED
    assert caplog.text == ""


def test_crystallm_pi_is_refused_for_its_brackets(folder: Path) -> None:
    _speaking(folder, [*TOKENS, *PI])
    (folder / "added_tokens.json").write_text('{"<unk>": 371}')
    message = _refused(folder)
    assert "lacks its tokens '[', ']'" in message
    assert "CrystaLLM-π" in message
    (folder / "vocabulary.json").unlink()
    _edit(folder / "config.json", bos_token_id=372)
    assert "the size of CrystaLLM-π's" in _refused(folder)
    _edit(folder / "config.json", bos_token_id=[372])
    assert "put its tokenizer.json or vocabulary.json there" in _refused(folder)


def test_a_vocabulary_without_ours_is_refused(folder: Path) -> None:
    _speaking(folder, [token for token in TOKENS if token not in {"Na", "Fm-3m_sg"}])
    assert "lacks 'Na', 'Fm-3m_sg' of this package's 371" in _refused(folder)
    longer = json.loads((folder / "vocabulary.json").read_text()) | {"Na": 369, "Fm-3m_sg": 370}
    (folder / "vocabulary.json").write_text(json.dumps(longer))
    assert "'Na', 'Fm-3m_sg' are beyond the 369 rows" in _refused(folder)


def test_without_a_tokenizer_371_rows_are_taken_for_ours(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer.json").unlink()
    assert _equal(read_huggingface(folder), _weights(BIASED))
    assert "taken for this package's tokens" in caplog.text


# The tokenizer


@pytest.fixture(scope="module")
def theirs() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files(16)["tokenizer.json"]))


def _same_tokens(theirs: Any, texts: list[str]) -> None:
    for text, found in zip(texts, theirs.encode_batch(texts), strict=True):
        ids = OURS.encode_cif(text).tolist()
        assert found.ids == ids, text
        assert theirs.decode(found.ids, skip_special_tokens=False) == OURS.decode(ids)


def test_the_corpus_is_tokenised_as_by_us(theirs: Any) -> None:
    texts = [record.text for record in itertools.islice(read_corpus(), 0, None, 20)]
    assert len(texts) > 50
    _same_tokens(theirs, texts)


def test_golden_texts_are_tokenised_as_published(theirs: Any, golden: Path) -> None:
    with gzip.open(golden / "prep.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    for record in records:
        assert theirs.encode(record["stream_text"]).ids == record["token_ids"], record["id"]
    _same_tokens(theirs, [record["raw_cif"] for record in records])


def test_every_token_is_decoded_as_by_us(theirs: Any) -> None:
    ids = list(range(len(TOKENS)))
    assert theirs.decode(ids, skip_special_tokens=False) == OURS.decode(ids)


def test_space_groups_are_marked_after_their_tag_and_before_a_line_end_alone(theirs: Any) -> None:
    groups = [*SPACEGROUPS, "P6", "P4_222", "P 1", "'P1'", "<unk>", ""]
    forms = (
        "{tag} {g}\n",
        "{tag}   {g}\n",
        "{tag}\t{g}\n",
        "{tag}{g}\n",
        "{tag} {g}",
        "{tag} {g} \n",
        "{g}_sg\n",
        "{g}",
    )
    _same_tokens(theirs, [form.format(tag=TAG, g=group) for group in groups for form in forms])
    _same_tokens(theirs, [f"{TAG} P1\n{TAG} Fm-3m\n{TAG} P1\r\n", f"_x{TAG} P1\n", f"{TAG}{TAG} P1\n"])


_PIECES = st.sampled_from(
    [*TOKENS, TAG, f"{TAG} P1\n", f"{TAG}  Fm-3m\n", "_sg", "<", ">", "\t", "\r", "é", "²", "́", "‿"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_PIECES, st.text(max_size=3)), max_size=20).map("".join))
def test_any_text_is_tokenised_as_by_us(theirs: Any, text: str) -> None:
    # The library's table of letters is of another Unicode version than Python's: characters new in one differ.
    category = unicodedata.ucd_3_2_0.category
    text = "".join(character for character in text if category(character) not in {"Cn", "Cs"})
    _same_tokens(theirs, [text])


# transformers itself


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def _their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_transformers_computes_the_same_logits_and_writes_what_we_read(
    config: ModelConfig, transformers: Any, tmp_path: Path
) -> None:
    weights = _weights(config)
    write_huggingface(tmp_path / "model", weights, card="")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    ids = np.random.default_rng(2).integers(0, 371, (2, 16))
    ours = jax.jit(GPT(config).apply)({"params": weights.params}, ids)
    np.testing.assert_allclose(_their_logits(model, ids), ours, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    read = read_huggingface(tmp_path / "again")
    assert read.config == config
    assert _equal(read, weights)
    # As versions before safetensors wrote it: both names of the tied table, and the masks.
    import torch

    (tmp_path / "again" / "model.safetensors").unlink()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool) for i in range(2)}
    torch.save({**model.state_dict(), **masks}, tmp_path / "again" / "pytorch_model.bin")
    assert _equal(read_huggingface(tmp_path / "again"), weights)
    torch.save(model.state_dict(), tmp_path / "again" / "pytorch_model.bin")
    assert _equal(read_huggingface(tmp_path / "again"), weights)


def test_golden_models_give_the_published_logits(golden: Path, transformers: Any, tmp_path: Path) -> None:
    for name in "abc":
        weights = read_published(golden / "model" / name / "ckpt.pt")
        write_huggingface(tmp_path / name, weights, card="")
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        expected = np.load(golden / "model" / name / "logits.npz")
        np.testing.assert_allclose(
            _their_logits(model, expected["input_ids"]), expected["logits"], rtol=0, atol=1e-5
        )
        assert _equal(read_huggingface(tmp_path / name), weights)


def test_greedy_tokens_of_transformers_are_the_published_ones(
    golden: Path, transformers: Any, tmp_path: Path
) -> None:
    recorded = np.load(golden / "sampling.npz")
    write_huggingface(tmp_path / "a", read_published(golden / "model" / "a" / "ckpt.pt"), card="")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    prompt = tokenizer(str(recorded["prompt"]), return_tensors="pt")
    # As many as the context holds, which is how long the folder's own settings say.
    sample = model.generate(**prompt, do_sample=False)[0].tolist()
    assert sample == recorded["greedy_ids"][:64].tolist()
    assert tokenizer.decode(sample) == OURS.decode(sample)


def test_the_tokenizer_loads_without_code(folder: Path, transformers: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = f"data_Na4Cl4\n{TAG}   Fm-3m\n  <unk> x"
    ids = tokenizer(text)["input_ids"]
    assert ids == OURS.encode_cif(text).tolist()
    assert tokenizer.decode(ids) == OURS.decode(ids)
    assert tokenizer.model_max_length == 16
    # Types of tokens would be embedded and added.
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    batch = tokenizer(["data_", "data_Na"], padding=True)
    assert batch["attention_mask"] == [[0, 1], [1, 1]]
