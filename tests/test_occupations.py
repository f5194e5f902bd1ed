from itertools import product

import numpy as np
import pytest

from crystallm_jax.cif import CIFError
from crystallm_jax.cif.occupations import (
    IMPOSSIBLE,
    common_step,
    compatible_spacegroups,
    fits,
    least_sites,
    least_sites_table,
    multiplicities,
)
from crystallm_jax.cif.vocabulary import SPACEGROUPS

_GROUPS = ("P1", "P-1", "Pmmm", "P4/mmm", "Fm-3m", "Fd-3m", "P4_232", "Ia-3d", "R-3m")


def _by_hand(counts: tuple[int, ...], symbol: str) -> int | None:
    """The fewest sites, by trying all: one site after the other, of the first element that is not done."""
    values, most = multiplicities(symbol)
    frontier = {(counts, (0,) * len(values))}
    for sites in range(sum(counts) + 1):
        if any(not any(left) for left, _ in frontier):
            return sites
        following = set()
        for left, used in frontier:
            element = next(i for i, n in enumerate(left) if n)
            for k, value in enumerate(values):
                if value <= left[element] and (not most[k] or used[k] < most[k]):
                    rest = (*left[:element], left[element] - value, *left[element + 1 :])
                    bounded = used[k] + (1 if most[k] else 0)
                    following.add((rest, (*used[:k], bounded, *used[k + 1 :])))
        frontier = following
    return None


@pytest.mark.parametrize("symbol", _GROUPS)
def test_the_fewest_sites_are_those_found_by_trying_all(symbol: str) -> None:
    step = common_step(symbol)
    for counts in product(range(step, 7 * step, step), repeat=2):
        expected = _by_hand(counts, symbol)
        assert least_sites({"Na": counts[0], "Cl": counts[1]}, symbol) == expected
        assert fits({"Na": counts[0], "Cl": counts[1]}, symbol) == (expected is not None)


@pytest.mark.parametrize("symbol", _GROUPS)
@pytest.mark.parametrize("joint", [False, True])
def test_the_table_knows_the_fewest_sites_of_a_whole_crystal(symbol: str, joint: bool) -> None:
    step = common_step(symbol)
    for first, second in [(1, 1), (2, 6), (5, 3)]:
        counts = [first * step, second * step]
        table = least_sites_table([counts] if joint else [[n] for n in counts], symbol)
        fewest = least_sites(dict(zip("NC", counts, strict=True)), symbol)
        assert table[-1, 0] == (IMPOSSIBLE if fewest is None else fewest)
        assert not table[0].any()


def test_states_of_the_table_lead_to_each_other() -> None:
    # Atoms of 4 in steps of 4, then of 8: the second level's full state stands before the first one's empty one.
    table = least_sites_table([[4], [8]], "Fm-3m")
    bounds = [bound for bound in multiplicities("Fm-3m").most if bound]
    assert table.shape == (3 + 2, int(np.prod([bound + 1 for bound in bounds])))
    assert np.array_equal(table[2], table[3])


def test_positions_without_parameters_are_taken_once() -> None:
    # Fm-3m has 4a, 4b and 8c; no more sites of these multiplicities.
    assert fits({"Na": 4, "Cl": 4}, "Fm-3m")
    assert not fits({"Na": 4, "Cl": 4, "K": 4}, "Fm-3m")
    assert fits({"Na": 4, "Cl": 4, "K": 8}, "Fm-3m")
    assert not fits({"Na": 6, "Cl": 4}, "Fm-3m")


def test_compatible_groups_are_those_that_fit_by_number() -> None:
    counts = {"Sr": 1, "Ti": 1, "O": 3}
    found = compatible_spacegroups(counts)
    assert set(found) == {symbol for symbol in SPACEGROUPS if fits(counts, symbol)}
    numbers = [SPACEGROUPS[symbol] for symbol in found]
    assert numbers == sorted(numbers)
    assert "Pm-3m" in found
    assert "Fm-3m" not in found


def test_a_group_holds_at_most_eight_multiplicities() -> None:
    for symbol in SPACEGROUPS:
        values, most = multiplicities(symbol)
        assert 1 <= len(values) == len(most) <= 8
        assert list(values) == sorted(set(values))
        # The general position takes any number of sites.
        assert most[-1] == 0


def test_what_is_no_composition_or_group_is_refused() -> None:
    with pytest.raises(CIFError, match="at least one element"):
        least_sites({}, "P1")
    with pytest.raises(CIFError, match="at least one element"):
        fits({"Na": 0}, "P1")
    with pytest.raises(CIFError, match="Fm-4m"):
        fits({"Na": 4}, "Fm-4m")
