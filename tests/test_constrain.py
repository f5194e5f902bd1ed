"""The proof: whatever a model would draw, under constraint its texts end, parse, and have their composition."""

import re
import warnings
from collections import Counter
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymatgen.core import Lattice
from pymatgen.core.operations import SymmOp

from crystallm_jax.cif import (
    SPACEGROUPS,
    CIFTokenizer,
    make_prompt,
    postprocess_cif,
    preprocess_cif,
    spacegroup_operations,
    stream_text,
)
from crystallm_jax.cif.formula import parse_formula
from crystallm_jax.cif.occupations import compatible_spacegroups
from crystallm_jax.cif.wyckoff import site_classes
from crystallm_jax.data.corpus import read_corpus
from crystallm_jax.errors import SamplingError
from crystallm_jax.evaluation.parsing import parse_blocks
from crystallm_jax.evaluation.validity import (
    is_formula_consistent,
    is_multiplicity_consistent,
    is_sensible,
)
from crystallm_jax.sampling.constrain import (
    Automaton,
    AutomatonState,
    RowPlan,
    advance,
    allowed,
    idle_state,
)
from crystallm_jax.sampling.constrain.atoms import atom_tables
from crystallm_jax.sampling.constrain.nodes import TOKEN_ID, Node

LEVELS = ("syntax", "composition", "symmetry", "positions")
LIMIT = 1024
# Rows and steps of the one compiled function that all tests share.
ROWS, STEPS = 24, 256
COMPOSITIONS = (
    "Na4Cl4", "Sr1Ti1O3", "Si8", "H1", "Ca4P4H4O16", "Ce4Cu4Si8", "Lu3Tl3S6", "He12Si12O24", "Cu1Ag1Si1Ni1",
    "K4Al12Si12O48", "Ba2Y1Cu3O7", "C60", "Th12Co28", "Fe4Co2Si2", "U1", "Mg2Si2", "Ag8Cu4Si4Ge8", "Li1Fe1P1O4",
    "Xe1F6", "Rb3H18Ru3N6",
)  # fmt: skip
NUMBER = r"(?:0|[1-9]\d*)\.\d{4}"
FILE = re.compile(
    rf"""data_(?P<data>(?:[A-Z][a-z]?[1-9]\d*)+)
loop_
_atom_type_symbol
_atom_type_electronegativity
_atom_type_radius
_atom_type_ionic_radius
(?P<properties>(?:[A-Z][a-z]?(?: \d+\.\d+){{3}}\n)+)_symmetry_space_group_name_H-M (?P<group>\S+)
_cell_length_a (?P<a>{NUMBER})
_cell_length_b (?P<b>{NUMBER})
_cell_length_c (?P<c>{NUMBER})
_cell_angle_alpha (?P<alpha>{NUMBER})
_cell_angle_beta (?P<beta>{NUMBER})
_cell_angle_gamma (?P<gamma>{NUMBER})
_symmetry_Int_Tables_number (?P<number>[1-9]\d*)
_chemical_formula_structural[ \n](?P<structural>[A-Za-z0-9()]+)
_chemical_formula_sum[ \n](?P<sum>[A-Z][a-z]?\d+|'[A-Z][a-z]?\d+(?: [A-Z][a-z]?\d+)*')
_cell_volume (?P<volume>{NUMBER})
_cell_formula_units_Z (?P<units>\d+)
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
(?P<sites>(?:.+\n)+)
"""
)
COORDINATE = r"(?:0\.\d{4}|1\.0000|-0\.0000)"
SITE = re.compile(rf"([A-Z][a-z]?) \1(\d+) ([1-9]\d*) ({COORDINATE}) ({COORDINATE}) ({COORDINATE}) 1\.0")


class Play(NamedTuple):
    """What happened to a batch, step by step: all but the state are [T, B]."""

    state: AutomatonState
    token: np.ndarray
    live: np.ndarray
    choices: np.ndarray
    in_mask: np.ndarray


@cache
def _tokenizer() -> CIFTokenizer:
    return CIFTokenizer()


@partial(jax.jit, static_argnums=0)
def _steps(
    automaton: Automaton,
    state: AutomatonState,
    given: jax.Array,
    stop: jax.Array,
    keys: jax.Array,
    first: jax.Array,
) -> tuple:
    """STEPS tokens a row: those given [B, STEPS], where they are -1 any that is allowed; rows stop at `stop` [B]."""

    def step(state: AutomatonState, t: jax.Array) -> tuple:
        mask = allowed(automaton, state)
        draws = jax.vmap(jax.random.fold_in, (0, None))(keys, first + t)
        drawn = jax.vmap(jax.random.categorical)(draws, jnp.where(mask, 0.0, -jnp.inf))
        token = jnp.where(given[:, t] >= 0, given[:, t], drawn).astype(jnp.int32)
        live = (t < stop) & ~state.waiting & (state.node != Node.DONE)
        in_mask = jnp.take_along_axis(mask, token[:, None], axis=1)[:, 0]
        return advance(automaton, state, token, live), (token, live, mask.sum(axis=1), in_mask)

    return jax.lax.scan(step, state, jnp.arange(STEPS))


def _play(
    automaton: Automaton,
    state: AutomatonState,
    *,
    given: np.ndarray | None = None,
    stop: np.ndarray | None = None,
    seed: int = 0,
    first: int = 0,
) -> Play:
    given = np.full((ROWS, STEPS), -1) if given is None else given
    stop = np.full(ROWS, STEPS) if stop is None else stop
    keys = jax.random.split(jax.random.key(seed), ROWS)
    state, seen = _steps(automaton, state, given, stop, keys, first)
    return Play(state, *map(np.asarray, seen))


def _batch(plans: list[RowPlan]) -> AutomatonState:
    plans = plans + plans[:1] * (ROWS - len(plans))
    return jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *(plan.state for plan in plans))


class Row(NamedTuple):
    """A text to write, and the most tokens that it may have."""

    prompt: str
    limit: int


def _sample(level: str, wanted: list[Row]) -> tuple[list[str], list[int]]:
    """A text of random allowed tokens for each of ROWS prompts, and how many tokens it has."""
    automaton = Automaton(level)
    texts = [_tokenizer().encode_cif(row.prompt).tolist() for row in wanted]
    state, first = idle_state(automaton, ROWS), 0
    unplanned = list(range(ROWS))
    while True:
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
        for b in unplanned:
            plan = automaton.plan(np.array(texts[b]), limit=wanted[b].limit)
            texts[b].extend(plan.forced.tolist())
            for leaf, new in zip(leaves, jax.tree.leaves(plan.state), strict=True):
                leaf[b] = new
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        played = _play(automaton, state, first=first)
        state, first = played.state, first + STEPS
        assert (played.choices > 0).all()
        for b in range(ROWS):
            texts[b] += played.token[played.live[:, b], b].tolist()
        unplanned = np.flatnonzero(state.waiting).tolist()
        if not unplanned and not played.live[-1].any():
            return [_tokenizer().decode(text) for text in texts], [len(text) for text in texts]


def _check_syntax(text: str) -> re.Match[str]:
    """A well-formed file of the dialect, by means that the automaton does not know of."""
    found = FILE.fullmatch(text)
    assert found is not None, text
    for n, line in enumerate(found["sites"].splitlines()):
        site = SITE.fullmatch(line)
        assert site is not None, line
        assert int(site[2]) == n
    post = postprocess_cif(text)
    parse_blocks(post)
    assert is_sensible(post)
    assert float(found["volume"]) > 0
    return found


def _check_composition(text: str) -> None:
    found = _check_syntax(text)
    counts = parse_formula(found["data"])
    post = postprocess_cif(text)
    parsed = parse_blocks(post)
    with warnings.catch_warnings(action="ignore"):  # He has no electronegativity
        assert is_formula_consistent(post, parsed)
    assert is_multiplicity_consistent(parsed)
    assert parse_formula(found["sum"].strip("'")) == counts
    assert [row.split()[0] for row in found["properties"].splitlines()] != []
    assert {row.split()[0] for row in found["properties"].splitlines()} == set(counts)
    assert int(found["number"]) == SPACEGROUPS[found["group"]]
    totals = Counter[str]()
    for line in found["sites"].splitlines():
        totals[line.split()[0]] += int(line.split()[2])
    assert totals == counts


def _check_symmetry(text: str) -> None:
    _check_composition(text)
    found = _check_syntax(text)
    classes = site_classes(found["group"])
    free = {multiplicity for multiplicity, positions in classes if positions is None}
    fixed = {multiplicity: positions for multiplicity, positions in classes if positions is not None}
    used = Counter(int(line.split()[2]) for line in found["sites"].splitlines())
    for multiplicity, sites in used.items():
        assert multiplicity in free or sites <= fixed[multiplicity]
    a, b, c, alpha, beta, gamma = (found[name] for name in ("a", "b", "c", "alpha", "beta", "gamma"))
    right = "90.0000"
    number = int(found["number"])
    if number >= 195:
        assert a == b == c
    elif number >= 75:
        assert a == b
    if number >= 16:
        assert alpha == beta == right
        assert gamma == ("120.0000" if 143 <= number < 195 else right)
    elif number >= 3:
        assert alpha == gamma == right


def _check_positions(text: str) -> None:
    _check_symmetry(text)
    found = _check_syntax(text)
    operations = [SymmOp.from_xyz_str(line) for line in spacegroup_operations(found["group"])]
    for line in found["sites"].splitlines():
        _, _, multiplicity, *coordinates = line.split()[:6]
        point = np.array([_THIRDS.get(x, float(x)) for x in coordinates])
        steps = np.stack([operation.operate(point) for operation in operations]) - point
        # The operations that leave a site where it is, but for the rounding of coordinates that hang together.
        kept = int((np.abs(steps - np.rint(steps)).max(axis=1) < 2.5e-4).sum())
        assert kept >= len(operations) / int(multiplicity)
    lattice = Lattice.from_parameters(
        *(float(found[name]) for name in ("a", "b", "c", "alpha", "beta", "gamma"))
    )
    assert float(found["volume"]) == pytest.approx(min(lattice.volume, 2e5), rel=3e-3)


_THIRDS = {"0.3333": 1 / 3, "0.6667": 2 / 3}
CHECKS = {
    "syntax": _check_syntax,
    "composition": _check_composition,
    "symmetry": _check_symmetry,
    "positions": _check_positions,
}


def _places(text: str) -> list[tuple[float, ...]]:
    """Coordinates of the sites within the cell."""
    sites = (SITE.fullmatch(line) for line in _check_syntax(text)["sites"].splitlines())
    return [tuple(float(x) % 1 for x in site.groups()[3:]) for site in sites if site is not None]


def _wanted(level: str) -> list[Row]:
    """Prompts of all kinds; some have no more room than the shortest file of theirs takes."""
    groups = []
    for n, composition in enumerate(COMPOSITIONS[::2]):
        symbols = compatible_spacegroups(parse_formula(composition))
        groups.append(make_prompt(composition, symbols[-1 - 31 * n % len(symbols)]))
    prompts = [*map(make_prompt, COMPOSITIONS[1::2]), *groups, *["data_"] * 4]
    return [Row(text, LIMIT if n % 3 else _least_limit(level, text)) for n, text in enumerate(prompts)]


def _least_limit(level: str, prompt: str) -> int:
    with pytest.raises(SamplingError, match="is too small") as refused:
        Automaton(level).plan(_tokenizer().encode_cif(prompt), limit=2)
    found = re.search(r"takes (\d+)", str(refused.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("level", LEVELS)
def test_any_model_writes_whole_files_of_its_prompt(level: str) -> None:
    wanted = _wanted(level)
    texts, lengths = _sample(level, wanted)
    for row, text, length in zip(wanted, texts, lengths, strict=True):
        assert length <= row.limit
        assert text.startswith(re.sub(" +", " ", row.prompt))
        CHECKS[level](text)
        # At level `positions` sites that coincide are found by their distance, once they are written.
        assert level == "positions" or len(set(_places(text))) == len(_places(text))
    assert len(set(texts)) == len(texts)


@cache
def _real_texts(level: str) -> tuple[np.ndarray, ...]:
    records = list(read_corpus())[::113]
    if level == "positions":
        # The corpus has its cells from radii of ions: some are larger than any crystal of such atoms.
        records = [record for record in list(read_corpus())[::89] if _has_fitting_cell(record.text)]
    texts = [_tokenizer().encode_cif(stream_text(preprocess_cif(record.text))) for record in records]
    return tuple([text for text in texts if len(text) <= 3 * STEPS][:ROWS])


def _has_fitting_cell(cif: str) -> bool:
    text = stream_text(preprocess_cif(cif))
    table = atom_tables()
    counts = parse_formula(text.split("\n", 1)[0].removeprefix("data_"))
    total = sum(count * table.volumes[TOKEN_ID[element]] for element, count in counts.items())
    volume = float(text.split("_cell_volume ")[1].split("\n")[0])
    least, most = table.shares
    return bool(least * total < volume < most * total)


def _end_of_beginning(text: np.ndarray, kind: str) -> int:
    if kind == "composition":
        return int(np.argmax(text == _tokenizer().newline_id)) + 1
    return int(np.argmax(text >= _tokenizer().token_to_id["P6/mmm_sg"])) + 1


@pytest.mark.parametrize("level", LEVELS)
def test_real_crystals_are_accepted_token_by_token(level: str) -> None:
    automaton = Automaton(level)
    texts = _real_texts(level)
    assert len(texts) == ROWS
    kind = "spacegroup" if level in ("symmetry", "positions") else "composition"
    plans, rests = [], []
    for text in texts:
        start = _end_of_beginning(text, kind)
        plan = automaton.plan(text[:start], limit=LIMIT)
        assert text[start:][: len(plan.forced)].tolist() == plan.forced.tolist()
        plans.append(plan)
        rests.append(text[start + len(plan.forced) :])
    state = _batch(plans)
    for first in range(0, max(map(len, rests)), STEPS):
        given = np.full((ROWS, STEPS), -1)
        stop = np.zeros(ROWS, int)
        for b, rest in enumerate(rests):
            piece = rest[first : first + STEPS]
            given[b, : len(piece)], stop[b] = piece, len(piece)
        played = _play(automaton, state, given=given, stop=stop)
        state = played.state
        assert (played.in_mask | ~played.live).all()
    assert (np.asarray(state.node) == Node.DONE).all()


def test_the_space_group_of_a_real_crystal_may_be_drawn() -> None:
    automaton = Automaton("symmetry")
    for text in _real_texts("symmetry"):
        plan = automaton.plan(text[: _end_of_beginning(text, "composition")], limit=LIMIT)
        group = int(text[_end_of_beginning(text, "spacegroup") - 1])
        assert (plan.state.groups[group // 32] >> (group % 32)) & 1


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_forced_leads_from_the_start_of_a_plan_to_its_end(level: str) -> None:
    automaton = Automaton(level)
    texts = [make_prompt("Na4Cl4"), make_prompt("Na4Cl4", "Fm-3m"), "data_"]
    plans = [automaton.plan(_tokenizer().encode_cif(text), limit=LIMIT) for text in texts]
    counts = [len(plan.forced) for plan in plans]
    assert counts[0] > 5 > counts[2]
    given, stop = np.full((ROWS, STEPS), -1), np.zeros(ROWS, int)
    stop[: len(counts)] = counts
    starts = [plan._replace(state=plan.start) for plan in plans]
    played = _play(automaton, _batch(starts), given=given, stop=stop)
    for b, plan in enumerate(plans):
        # Whatever is drawn: there is one choice.
        assert played.token[: counts[b], b].tolist() == plan.forced.tolist()
        assert (played.choices[: counts[b], b] == 1).all()
        came = jax.tree.map(lambda leaf, b=b: np.asarray(leaf[b]), played.state)
        jax.tree.map(np.testing.assert_array_equal, came, plan.state)


def test_rows_that_are_idle_stay_so() -> None:
    automaton = Automaton("symmetry")
    state = idle_state(automaton, ROWS)
    assert not np.asarray(state.waiting).any()
    played = _play(automaton, state)
    assert not played.live.any()
    assert (played.choices == 1).all()
    jax.tree.map(np.testing.assert_array_equal, played.state, state)
