"""Rows that go back in their texts, and rows that become several: what they draw is what fresh rows would draw."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

import crystallm_jax as cl
from crystallm_jax.cif import make_prompt
from crystallm_jax.cif.vocabulary import TOKENS
from crystallm_jax.model import GPT, ModelConfig
from crystallm_jax.model.inference import Weights, prepare_weights
from crystallm_jax.models.published_names import parameter_table
from crystallm_jax.sampling.constrain import Automaton
from crystallm_jax.sampling.decode import Rules
from crystallm_jax.sampling.device_rows import look_at
from crystallm_jax.sampling.devices import Placement
from crystallm_jax.sampling.engine import Ended, Engine, EngineShape, Row
from crystallm_jax.sampling.methods import SamplingMethod

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=12)
LONG = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=640, vocab_size=371)
PAGE = 16
# No token ends a text.
FREE = Rules(SamplingMethod(temperature=0.8, top_k=10), newline_id=-1)
HELD = Rules(SamplingMethod(top_k=None), newline_id=0, automaton=Automaton("symmetry"))
PROMPTS = [np.arange(n) * 7 % 12 for n in (9, 1, 40, 17)]


def _key(number: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(number)))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Parameters large enough that no two logits are close; float32."""
    rng = np.random.default_rng(1)
    params: dict[str, Any] = {}
    for entry in parameter_table(CONFIG).values():
        place = params
        for part in entry.path[:-1]:
            place = place.setdefault(part, {})
        noise = 0.2 * rng.standard_normal(entry.held)
        place[entry.path[-1]] = (noise + (entry.path[-1] == "scale")).astype(np.float32)
    return params


@pytest.fixture(scope="module")
def weights(params: dict[str, Any]) -> Weights:
    return jax.jit(prepare_weights, static_argnums=0)(CONFIG, params)


def _engine(weights: Weights, rows: int, *, config: ModelConfig = CONFIG, rules: Rules = FREE) -> Engine:
    shape = EngineShape(config, rules, rows, PAGE, "float32", config.block_size)
    return Engine(shape, weights, Placement((jax.devices()[0],)))


def _step(engine: Engine, times: int = 1) -> list[Ended]:
    ended = []
    for _ in range(times):
        engine.start()
        ended += engine.finish()
    return ended


def _to_the_end(engine: Engine) -> dict[tuple[int, int], Ended]:
    ended: list[Ended] = []
    while engine.taken:
        ended += _step(engine)
    return {one.row.name: one for one in ended}


def _texts(engine: Engine) -> dict[tuple[int, int], np.ndarray]:
    """What the rows have written so far."""
    seen = look_at(engine._state, np.arange(len(engine._rows)))
    return {
        row.name: seen.tokens[place, : seen.length[place]]
        for place, row in enumerate(engine._rows)
        if row is not None
    }


def _fresh(weights: Weights, rows: Sequence[Row], batch_size: int) -> dict[tuple[int, int], Ended]:
    engine = _engine(weights, batch_size)
    done = {}
    for begin in range(0, len(rows), batch_size):
        engine.admit(rows[begin : begin + batch_size])
        done |= _to_the_end(engine)
    return done


def _log_prob(params: dict[str, Any], ended: Ended) -> float:
    tokens = ended.tokens
    logits = GPT(CONFIG).apply({"params": params}, tokens[None, :-1])
    of_tokens = jax.nn.log_softmax(logits)[0, np.arange(len(tokens) - 1), tokens[1:]]
    return float(of_tokens[len(ended.row.prompt) - 1 :].sum())


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_a_row_that_is_taken_back_draws_what_a_fresh_row_with_its_history_would_draw(
    batch_size: int, weights: Weights, params: dict[str, Any]
) -> None:
    engine = _engine(weights, 4)
    rows = [Row((i, 0), prompt, _key(i), 120) for i, prompt in enumerate(PROMPTS)]
    engine.admit(rows)
    _step(engine, 3)
    texts = _texts(engine)
    # Into a page, to a page's edge, to the prompt; the last row stays.
    back = {(0, 0): 31, (1, 0): 17, (2, 0): len(PROMPTS[2])}
    engine.take_back(back)
    _step(engine)
    again = _texts(engine)
    for name, to in back.items():
        assert again[name][:to].tolist() == texts[name][:to].tolist()
        assert again[name][to : to + 15].tolist() != texts[name][to : to + 15].tolist()
    # Once more, not to where it had been before.
    engine.take_back({(0, 0): 22})
    ended = _to_the_end(engine)
    histories = [
        Row((0, 0), texts[0, 0][:22], _key(0), 120, returns=2),
        Row((1, 0), texts[1, 0][:17], _key(1), 120, returns=1),
        Row((2, 0), texts[2, 0][: len(PROMPTS[2])], _key(2), 120, returns=1),
        rows[3],
    ]
    fresh = _fresh(weights, histories, batch_size)
    for name, one in ended.items():
        assert one.tokens.tolist() == fresh[name].tokens.tolist()
        assert one.log_prob == pytest.approx(_log_prob(params, one), abs=2e-4)
    assert len(engine._pool._free) == len(engine._pool._owner)


def test_the_same_text_is_written_when_nothing_was_taken_back(weights: Weights) -> None:
    row = Row((0, 0), PROMPTS[0], _key(5), 120)
    whole = _fresh(weights, [row], 1)[0, 0].tokens
    # The randomness of a position is its own.
    rest = _fresh(weights, [row._replace(prompt=whole[:50])], 1)[0, 0].tokens
    assert whole.tolist() == rest.tolist()


@pytest.mark.parametrize(("name", "length"), [((0, 0), 8), ((0, 0), 122), ((7, 0), 10)])
def test_to_where_a_row_never_was_it_cannot_go_back(
    name: tuple[int, int], length: int, weights: Weights
) -> None:
    engine = _engine(weights, 4)
    engine.admit([Row((0, 0), PROMPTS[0], _key(0), 120)])
    _step(engine)
    with pytest.raises(ValueError, match=r"go back to|no row is named"):
        engine.take_back({name: length})


def test_a_row_that_forks_goes_on_as_several_with_randomness_of_their_own(weights: Weights) -> None:
    engine = _engine(weights, 4)
    engine.admit([Row((i, 0), PROMPTS[i], _key(i), 120) for i in range(2)])
    _step(engine, 2)
    text = _texts(engine)[0, 0]
    forks = [Row((0, n), PROMPTS[0], _key(100 + n), 90 + n) for n in (1, 2)]
    engine.fork((0, 0), forks)
    assert engine.taken == 4
    ended = _to_the_end(engine)
    whole = _fresh(weights, [Row((0, 0), PROMPTS[0], _key(0), 120)], 1)[0, 0].tokens
    assert ended[0, 0].tokens.tolist() == whole.tolist()
    fresh = _fresh(weights, [fork._replace(prompt=text) for fork in forks], 2)
    for fork in forks:
        assert ended[fork.name].tokens.tolist() == fresh[fork.name].tokens.tolist()
        assert len(ended[fork.name].tokens) == fork.limit
    assert len(engine._pool._free) == len(engine._pool._owner)


def _held(rows: int) -> tuple[Engine, cl.CrystalModel]:
    model = cl.new_model(LONG, seed=1)
    weights = jax.jit(prepare_weights, static_argnums=0)(LONG, model.params)
    rules = Rules(HELD.method, model.tokenizer.token_to_id["\n"], HELD.automaton)
    return _engine(weights, rows, config=LONG, rules=rules), model


def test_held_to_symmetry_a_row_goes_back_to_any_place_of_its_text() -> None:
    engine, model = _held(2)
    prompts = [model.tokenizer.encode_cif(make_prompt(name)).astype(np.int32) for name in ("Na4Cl4", "Si8")]
    rows = [Row((i, 0), prompt, _key(i), LONG.block_size) for i, prompt in enumerate(prompts)]
    ends = []
    for admitted in (rows, rows[:1]):
        engine.admit(admitted)
        _step(engine, 6)
        before = _texts(engine)[0, 0]
        registers = jax.tree.map(lambda leaf: np.asarray(leaf[0]), engine._state.automaton)
        # To where it stands: the same registers, found anew.
        engine.take_back({(0, 0): len(before)})
        found = jax.tree.map(lambda leaf: np.asarray(leaf[0]), engine._state.automaton)
        jax.tree.map(np.testing.assert_array_equal, found, registers)
        group = next(n for n, token in enumerate(before) if TOKENS[token].endswith("_sg"))
        # Behind the space group, before it, and into what is forced.
        for to in (group + 30, group, len(prompts[0]) + 7):
            engine.take_back({(0, 0): to})
            _step(engine, 3)
            assert _texts(engine)[0, 0][:to].tolist() == before[:to].tolist()
        ended = _to_the_end(engine)[0, 0]
        report = cl.validate(cl.postprocess_cif(model.tokenizer.decode(ended.tokens)))
        assert report.formula_consistent
        assert report.multiplicity_consistent
        ends.append(ended.tokens.tolist())
    # Whatever else is in the batch.
    assert ends[0] == ends[1]
