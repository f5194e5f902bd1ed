"""Continuous batching: rows come and go, and neither the batch nor the order shows in a sample."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import crystallm_jax as cl
from crystallm_jax.cif import make_prompt
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.errors import SamplingError
from crystallm_jax.model import GPT, ModelConfig
from crystallm_jax.models.published_names import parameter_table
from crystallm_jax.sampling import reader
from crystallm_jax.sampling.devices import Placement
from crystallm_jax.sampling.engine import Engine
from crystallm_jax.sampling.generate import generate
from crystallm_jax.sampling.methods import SamplingMethod
from crystallm_jax.sampling.page_pool import Pool
from crystallm_jax.sampling.requests import Completion, EverySample, GenerationRequest, Orders, Wanted

# The shapes and batches of tests/test_sampling.py, so that the two share what is compiled.
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=12)
NEWLINE = 7
METHOD = SamplingMethod(temperature=0.8, top_k=10)
PROMPTS = [np.arange(n) * 7 % 12 for n in (9, 3, 40, 17, 9)]
# Eight samples of each prompt, of very different lengths; None goes on to the context's end.
LIMITS = (None, 1, 17, 2, 60, 5, 33, 16)
WANTED = [Wanted(prompt, sample, LIMITS[(prompt + sample) % 8]) for sample in range(8) for prompt in range(5)]
# A context that holds the constrained text of a small cell.
LONG = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=640, vocab_size=371)
COMPOSITIONS = ("Na4Cl4", "Si8", "Sr1Ti1O3")


class _Listed:
    """Orders from a list: so many at a time, and, where `waits`, nothing more until waited for.

    `being_made` are those taken and not yet seen to come out.
    """

    def __init__(self, wanted: Sequence[Wanted], *, at_once: int = 1000, waits: bool = False) -> None:
        self._rest, self._at_once, self._waits = list(wanted), at_once, waits
        self._ready = 0 if waits else len(wanted)
        self.being_made: set[tuple[int, int]] = set()
        self.times_waited = 0

    def take(self, most: int) -> Sequence[Wanted]:
        count = min(most, self._at_once, self._ready)
        taken, self._rest = self._rest[:count], self._rest[count:]
        self._ready -= len(taken)
        self.being_made |= {one[:2] for one in taken}
        return taken

    def wait(self) -> bool:
        assert not self.being_made
        self.times_waited += 1
        if self._waits:
            self._ready = min(self._at_once, len(self._rest))
        return bool(self._rest)


def _random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters large enough that no two logits are close; float32."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for entry in parameter_table(config).values():
        place = params
        for part in entry.path[:-1]:
            place = place.setdefault(part, {})
        spread = 0.3 if entry.path[-1] == "scale" else 0.12 if entry.path[-1] == "embedding" else 0.2
        noise = spread * rng.standard_normal(entry.held)
        place[entry.path[-1]] = (noise + (entry.path[-1] == "scale")).astype(np.float32)
    return jax.device_put(params)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return _random_params(CONFIG, 1)


Made = dict[tuple[int, int], Completion]


def _make(params: dict[str, Any], orders: Orders, **settings: Any) -> Made:
    """What becomes of orders, each made once."""
    request = GenerationRequest(**{"method": METHOD, "seed": 5, "batch_size": 5, **settings})
    made: Made = {}
    for batch in generate(CONFIG, params, PROMPTS, newline_id=NEWLINE, request=request, orders=orders):
        for row in batch:
            assert row[:2] not in made
            made[row[:2]] = row
        if isinstance(orders, _Listed):
            orders.being_made -= {row[:2] for row in batch}
    return made


def _tokens(made: Made) -> dict[tuple[int, int], tuple[int, ...]]:
    return {name: row.token_ids for name, row in made.items()}


@pytest.fixture(scope="module")
def made(params: dict[str, Any]) -> Made:
    """All of `WANTED`, five at a time in that order."""
    return _make(params, _Listed(WANTED))


def _check_book(pool: Pool) -> None:
    """Every page is free or has one owner, who knows of it; free ones hold nothing."""
    pages = [page for row in pool._pages for page in row]
    assert sorted([*pages, *pool._free]) == list(range(len(pool._owner)))
    for row, own in enumerate(pool._pages):
        assert (pool._owner[own] == row).all()
        assert ((pool._fill[own] > 0) & (pool._fill[own] <= pool.size)).all()
    assert (pool._owner[pool._free] == len(pool._pages)).all()
    assert (pool._fill[pool._free] == 0).all()
    assert sum(block.keys[0].shape[0] for block in pool.blocks) == len(pool._owner)
    table = pool.table()
    for row, own in enumerate(pool._pages):
        assert np.asarray(table.pages[row]).tolist() == own + [len(pool._owner)] * (
            table.pages.shape[1] - len(own)
        )


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Check the book of every engine after each step; the engines, once for each step."""
    steps: list[Engine] = []
    finish = Engine.finish

    def checked(engine: Engine) -> Any:
        ended = finish(engine)
        _check_book(engine._pool)
        for place, row in enumerate(engine._rows):
            # Whatever a row has read stands in its pages: all of its tokens, at the latest a step later.
            positions = int(engine._pool.fill_of(engine._pool.pages_of(place)).sum())
            assert positions == (0 if row is None else engine._read[place])
            assert 0 <= engine._length[place] - engine._read[place] <= 1
        steps.append(engine)
        return ended

    monkeypatch.setattr(Engine, "finish", checked)
    return steps


def test_rows_have_the_lengths_that_were_wanted(made: Made) -> None:
    assert set(made) == {one[:2] for one in WANTED}
    for one in WANTED:
        row, prompt = made[one[:2]], PROMPTS[one.prompt_index]
        limit = min(len(prompt) + (one.max_new_tokens or 1000), CONFIG.block_size + 1)
        assert list(row.token_ids[: len(prompt)]) == prompt.tolist()
        assert len(row.token_ids) <= limit if row.finished else len(row.token_ids) == limit
    assert {row.finished for row in made.values()} == {True, False}


def test_a_limit_only_cuts(made: Made, params: dict[str, Any]) -> None:
    whole = _make(params, EverySample([8] * len(PROMPTS)))
    for name, row in made.items():
        assert row.token_ids == whole[name].token_ids[: len(row.token_ids)]
        assert row.finished <= whole[name].finished


@pytest.mark.parametrize(
    ("batch_size", "at_once", "arrange"),
    [(1, 1000, list), (5, 2, reversed), (100, 3, reversed), (100, 1000, lambda w: [*w[20:], *w[:20]])],
    ids=["one by one", "backwards, in twos", "all, backwards", "all, the second half first"],
)
def test_neither_batch_nor_order_changes_a_sample(
    batch_size: int,
    at_once: int,
    arrange: Callable[[list[Wanted]], Sequence[Wanted]],
    made: Made,
    params: dict[str, Any],
) -> None:
    some = WANTED[:16] if batch_size > 5 else WANTED
    orders = _Listed(list(arrange(some)), at_once=at_once)
    again = _make(params, orders, batch_size=batch_size)
    assert _tokens(again) == {one[:2]: made[one[:2]].token_ids for one in some}
    for name, row in again.items():
        assert row.log_prob == pytest.approx(made[name].log_prob, abs=1e-4)
        assert row.finished == made[name].finished


def test_pages_have_one_owner_at_a_time_and_are_all_free_at_the_end(
    made: Made, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _watch(monkeypatch)
    assert _tokens(_make(params, _Listed(WANTED))) == _tokens(made)
    assert len(set(map(id, steps))) == 1
    assert len(steps) > 8
    assert len(steps[-1]._pool._free) == len(steps[-1]._pool._owner)
    assert steps[-1].free == 5


def test_a_row_that_ends_makes_room_at_once(
    made: Made, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _watch(monkeypatch)
    # One that fills the context from a short prompt takes four rounds; beside it, four at a time, twelve of one: a
    # step that reads the newest token of the prompt, and fifteen that draw.
    names = [name for name, row in made.items() if not row.finished and len(row.token_ids) == 65]
    prompt, sample = min(names, key=lambda name: len(PROMPTS[name[0]]))
    short = [Wanted(prompt, number, 15) for number in range(20) if number != sample][:12]
    _make(params, _Listed([Wanted(prompt, sample), *short]))
    assert len(steps) == -(-(CONFIG.block_size + 2 - len(PROMPTS[prompt])) // 16)


def test_prompts_are_read_once_for_all_their_samples(
    made: Made, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, readings = reader._read_columns, []

    def counted(*given: Any, **named: Any) -> Any:
        readings.append(int((named["columns"].text < len(named["columns"].first)).sum()))
        return read(*given, **named)

    monkeypatch.setattr(reader, "_read_columns", counted)
    of_one = [one for one in WANTED if one.prompt_index == 3]
    assert _tokens(_make(params, _Listed(of_one))) == {one[:2]: made[one[:2]].token_ids for one in of_one}
    assert readings == [16]
    # All but the last token of each; the first and the last prompt are the same tokens.
    readings.clear()
    assert _tokens(_make(params, _Listed(WANTED))) == _tokens(made)
    assert readings == [8 + 2 + 39 + 16]


def test_orders_that_give_nothing_are_waited_for_when_nothing_is_being_made(
    made: Made, params: dict[str, Any]
) -> None:
    orders = _Listed(WANTED[:12], at_once=5, waits=True)
    assert _tokens(_make(params, orders)) == {one[:2]: made[one[:2]].token_ids for one in WANTED[:12]}
    # For five, five and two; then there is no more to come.
    assert orders.times_waited == 4
    assert _make(params, _Listed([], waits=True)) == {}


def test_a_cache_of_bfloat16_is_close(made: Made, params: dict[str, Any]) -> None:
    rows = _make(params, _Listed(WANTED[:10]), cache_dtype="bfloat16")
    texts = np.zeros((len(rows), CONFIG.block_size + 1), np.int32)
    for text, row in zip(texts, rows.values(), strict=True):
        text[: len(row.token_ids)] = row.token_ids

    @jax.jit
    def log_probs(tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(GPT(CONFIG).apply({"params": params}, tokens))

    exact = np.take_along_axis(np.asarray(log_probs(texts[:, :-1])), texts[:, 1:, None], axis=-1)[..., 0]
    for (name, row), of_tokens in zip(rows.items(), exact, strict=True):
        new = slice(len(PROMPTS[name[0]]) - 1, len(row.token_ids) - 1)
        assert abs(row.log_prob - of_tokens[new].sum()) < 0.01 * (new.stop - new.start) + 1e-4
    # Rounded it is.
    assert any(row.log_prob != made[name].log_prob for name, row in rows.items())


# The pool.


def _pool(rows: int) -> Pool:
    return Pool(CONFIG, rows, size=4, dtype="float32", placement=Placement((jax.devices()[0],)))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_pool_grows_and_keeps_what_is_in_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "platform", property(lambda _: backend))
    pool = _pool(3)
    before = len(pool._owner)
    written: dict[int, float] = {}
    for count in range(1, 13):
        row = count % 3
        targets = pool.assign(row, [4] * 4 * count)
        numbers = np.arange(48, dtype=np.float32).reshape(-1, 1, 1, 1) + 100 * count
        pages = jax.tree.map(
            lambda leaf, numbers=numbers: numbers + np.zeros(leaf.shape[1:], np.float32), pool.blocks[0]
        )
        pool.put(pages, list(range(4 * count)), targets)
        written |= dict(zip(targets, numbers[: 4 * count].ravel().tolist(), strict=True))
        if count == 6:
            written = {page: value for page, value in written.items() if page not in pool.pages_of(1)}
            pool.release(1)
        _check_book(pool)
    assert len(pool._owner) > before
    assert (len(pool.blocks) > 1) == (backend == "cpu")
    for leaf in jax.tree.leaves(pool.gather(list(written), 512)):
        held = np.asarray(leaf)[: len(written)].reshape(len(written), -1)
        np.testing.assert_array_equal(
            held, np.repeat(np.array([[*written.values()]]).T, held.shape[1], axis=1)
        )
    for row in range(3):
        pool.release(row)
    _check_book(pool)
    assert int(pool.table().blocks) == 0


def test_pages_are_given_out_from_the_first_on() -> None:
    pool = _pool(2)
    assert pool.assign(0, [4, 4, 1]) == [0, 1, 2]
    assert pool.assign(1, [2]) == [3]
    pool.release(0)
    assert pool.assign(1, [4, 4]) == [0, 1]
    assert pool.pages_of(1) == [3, 0, 1]
    assert pool.fill_of(pool.pages_of(1)).tolist() == [2, 4, 4]


# Constrained.


@pytest.fixture(scope="module")
def model() -> cl.CrystalModel:
    return cl.new_model(LONG, seed=1)


def _constrained(model: cl.CrystalModel, **settings: Any) -> dict[tuple[int, int], cl.Sample]:
    request = GenerationRequest(
        method=SamplingMethod(top_k=None), num_samples=2, seed=2, constrain="symmetry", **settings
    )
    prompts = [make_prompt(composition) for composition in COMPOSITIONS]
    batches = model.generate_batches(prompts, request)
    return {(row.prompt_index, row.sample_index): row for batch in batches for row in batch}


@pytest.fixture(scope="module")
def held(model: cl.CrystalModel) -> dict[tuple[int, int], cl.Sample]:
    """Two samples of each composition, held to symmetry."""
    return _constrained(model)


def test_held_to_symmetry_an_untrained_model_writes_crystals(
    held: dict[tuple[int, int], cl.Sample],
) -> None:
    assert len(held) == 6
    for (prompt, _), sample in held.items():
        assert sample.finished
        assert parse_formula(sample.text.split("\n", 1)[0].removeprefix("data_")) == parse_formula(
            COMPOSITIONS[prompt]
        )
        report = sample.validate()
        assert report.formula_consistent
        assert report.multiplicity_consistent


def test_a_prompt_that_cannot_be_honoured_is_refused_before_any_sample_is_made(
    model: cl.CrystalModel,
) -> None:
    prompts = [make_prompt("Na4Cl4"), make_prompt("Na1Cl1", "Fm-3m")]
    request = GenerationRequest(batch_size=1, constrain="symmetry")
    with pytest.raises(SamplingError, match="cannot hold Na1Cl1"):
        next(model.generate_batches(prompts, request))


def test_what_the_prompt_holds_cannot_be_excluded_where_it_is_constrained(model: cl.CrystalModel) -> None:
    excluded = tuple(model.tokenizer.encode(["Cl"]))
    request = GenerationRequest(method=SamplingMethod(excluded=excluded), constrain="composition")
    with pytest.raises(SamplingError, match="prompt 0 holds the token"):
        next(model.generate_batches([make_prompt("Na4Cl4")], request))


def test_held_to_symmetry_the_batch_changes_no_sample(
    held: dict[tuple[int, int], cl.Sample], model: cl.CrystalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _watch(monkeypatch)
    alone = _constrained(model, batch_size=4)
    assert alone.keys() == held.keys()
    for name, row in alone.items():
        assert row.token_ids == held[name].token_ids
        assert row.log_prob == pytest.approx(held[name].log_prob, abs=2e-3)
    assert len(steps[-1]._pool._free) == len(steps[-1]._pool._owner)
