"""How many real crystals the constraints of sampling accept, token by token and by what is looked at.

    python benchmarks/real_crystals.py data/mp_26k:train data/mp_123k:test [--limit N] [--constrain positions]

Each text of a prepared folder's split is written, token by token, by the automaton of the level, from its space group
on. A text is refused where one of its tokens is not among those allowed; where its cell is flat, too small or too large
for its atoms; where two atoms are nearer than the least distance of their elements; or where a site lies on a position
of another multiplicity than it states. Apart from these, texts are counted in which pymatgen reads the images of an
atom, whose coordinates were rounded, as several: a sample goes back there, too.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystallm_jax.cif.vocabulary import SPACEGROUP_SUFFIX, TOKENS
from crystallm_jax.data.store import TokenStore
from crystallm_jax.errors import SamplingError
from crystallm_jax.sampling.constrain import Automaton, AutomatonState, advance, allowed
from crystallm_jax.sampling.constrain.looks import judge_site
from crystallm_jax.sampling.constrain.nodes import Kind, Node, Slot
from crystallm_jax.sampling.constrain.volumes import cell_fits

ROWS, STEPS = 512, 128
LIMIT = 1 << 13
ROUNDED = "read as several atoms"


class Played(NamedTuple):
    """Texts after the automaton has written them.

    Attributes:
        state: the registers.
        refused: int32 [B], the node at which a token was refused first, -1 for none.
        slot: int32 [B], the slot there.
    """

    state: AutomatonState
    refused: jax.Array
    slot: jax.Array


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def play(automaton: Automaton, played: Played, given: jax.Array, count: jax.Array) -> Played:
    """Write STEPS tokens [B, STEPS], as many as `count` [B] says."""

    def step(played: Played, t: jax.Array) -> tuple[Played, None]:
        state, token, live = played.state, given[:, t], (t < count) & (played.refused < 0)
        yes = jnp.take_along_axis(allowed(automaton, state), token[:, None], axis=1)[:, 0]
        no = live & ~yes
        refused, slot = jnp.where(no, state.node, played.refused), jnp.where(no, state.slot, played.slot)
        return Played(advance(automaton, state, token, live & yes), refused, slot), None

    return jax.lax.scan(step, played, jnp.arange(STEPS))[0]


@jax.jit
def judge(state: AutomatonState) -> tuple[jax.Array, jax.Array]:
    """Bool [B], whether the cell fits, and [B, 3], whether anything is against any site."""

    def one(site: jax.Array, found: jax.Array) -> jax.Array:
        verdict = judge_site(state, jnp.where(site < state.site, site, -1))
        return found | jnp.stack(verdict, axis=1)

    nothing = jnp.zeros((len(state.site), 3), bool)
    return cell_fits(state), jax.lax.fori_loop(0, jnp.max(state.site), one, nothing)


def verdicts(automaton: Automaton, texts: Sequence[np.ndarray]) -> list[tuple[str, ...]]:
    """What is against each of at most ROWS texts; nothing where it is accepted."""
    plans, rests, why = [], [], [()] * len(texts)
    for number, text in enumerate(texts):
        start = int(np.argmax(text >= _FIRST_GROUP)) + 1
        try:
            plan = automaton.plan(text[:start], limit=LIMIT)
        except SamplingError as error:
            why[number] = ("refused: " + str(error).split(":", 1)[1].strip()[:40],)
            continue
        if text[start:][: len(plan.forced)].tolist() != plan.forced.tolist():
            why[number] = ("forced text",)
            continue
        plans.append((number, plan.state))
        rests.append(text[start + len(plan.forced) :])
    rows = [state for _, state in plans]
    rows += rows[:1] * (ROWS - len(rows))
    state = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)
    none = jnp.full(ROWS, -1, jnp.int32)
    played = Played(state, none, none.copy())
    for first in range(0, max(map(len, rests)), STEPS):
        given, count = np.zeros((ROWS, STEPS), np.int32), np.zeros(ROWS, np.int32)
        for row, rest in enumerate(rests):
            piece = rest[first : first + STEPS]
            given[row, : len(piece)], count[row] = piece, len(piece)
        played = play(automaton, played, given, count)
    state = played.state
    refused, slot, node, kinds, field = jax.device_get(
        (played.refused, played.slot, state.node, state.kinds, state.field)
    )
    cell, sites = jax.device_get(judge(played.state))
    for row, (number, _) in enumerate(plans):
        if refused[row] >= 0:
            why[number] = (_token(refused[row], slot[row], kinds[row, field[row]]),)
        elif automaton.holds("positions"):
            assert node[row] == Node.DONE
            named = zip(("near", "special", ROUNDED), sites[row], strict=True)
            why[number] = (*(() if cell[row] else ("cell",)), *(name for name, found in named if found))
    return why


def _token(node: int, slot: int, kind: int) -> str:
    """What a token that is refused would have been part of."""
    if node not in (Node.WHOLE, Node.FRACTION):
        return f"token: {Node(node).name.lower()}"
    if slot != Slot.FIELD:
        return f"token: {Slot(slot).name.lower()}"
    return "cell" if kind <= Kind.THIRD else f"token: {Kind(kind).name.lower()}"


_FIRST_GROUP = min(i for i, token in enumerate(TOKENS) if token.endswith(SPACEGROUP_SUFFIX))


def batches(store: TokenStore, limit: int | None) -> Iterator[list[tuple[str, np.ndarray]]]:
    """The texts of a split with their ids, ROWS at a time."""
    texts = ((store.ids[i], store.record(i)) for i in range(min(len(store), limit or len(store))))
    while batch := list(islice(texts, ROWS)):
        yield batch


def main() -> None:
    """Measure the splits named on the command line, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("splits", nargs="+", help="prepared folder and split, as in data/mp_26k:train")
    parser.add_argument("--limit", type=int, help="texts of a split, from its first")
    parser.add_argument("--constrain", default="positions", help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark_real_crystals.json"), help="(%(default)s)"
    )
    args = parser.parse_args()
    automaton, results = Automaton(args.constrain), {}
    for name in args.splits:
        folder, split = name.rsplit(":", 1)
        reasons, refused, total = Counter[str](), {}, 0
        for batch in batches(TokenStore.open(folder, split), args.limit):
            for (id_, _), why in zip(batch, verdicts(automaton, [text for _, text in batch]), strict=True):
                total += 1
                reasons.update(why)
                if set(why) - {ROUNDED}:
                    refused[id_] = why
            print(f"\r{name}: {total} texts, {len(refused)} refused", end="", flush=True)
        print(f"\n  accepted: {1 - len(refused) / total:.3%}")
        for why, count in reasons.most_common():
            print(f"  {count:6} {why}")
        results[name] = {"texts": total, "refused": len(refused), "reasons": reasons, "which": refused}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"constrain": args.constrain, "splits": results}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
