"""Formulas of a chemical system: those whose charges balance, the smallest first, and why there are none."""

import pytest

from crystallm_jax.cif.formula import reduced_formula
from crystallm_jax.errors import CIFError, SamplingError
from crystallm_jax.sampling.chemistry import balanced_formulas


def _names(system: str, most_atoms: int = 12, fewest_elements: int | None = None) -> list[str]:
    formulas = balanced_formulas(system.split("-"), most_atoms, fewest_elements=fewest_elements)
    return [reduced_formula(counts)[0] for counts in formulas]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Na-Cl", ["NaCl"]),
        ("Cl-Na", ["NaCl"]),
        ("O-Al", ["Al2O3"]),
        ("Fe-O", ["FeO", "Fe2O3", "Fe3O4", "Fe4O5", "Fe5O6", "Fe5O7"]),
        ("Ba-Ti-O", ["BaTiO3", "BaTi2O5", "Ba2TiO4", "BaTi3O7", "Ba3TiO5", "Ba3Ti2O7", "Ba4TiO6"]),
    ],
)
def test_formulas_that_balance(system: str, expected: list[str]) -> None:
    assert sorted(_names(system)) == sorted(expected)


def test_the_smallest_come_first_and_none_twice() -> None:
    formulas = balanced_formulas(("Li", "Fe", "P", "O"), 12)
    atoms = [sum(counts.values()) for counts in formulas]
    assert atoms == sorted(atoms)
    assert max(atoms) <= 12
    names = [reduced_formula(counts)[0] for counts in formulas]
    assert "LiFePO4" in names
    assert len(set(names)) == len(names)
    assert all(set(counts) == {"Li", "Fe", "P", "O"} for counts in formulas)


def test_anions_are_more_electronegative_than_cations() -> None:
    # Chlorine has positive states, but not beside a metal alone.
    assert _names("K-Cl") == ["KCl"]
    assert "KClO4" in _names("K-Cl-O")


def test_subsystems_are_added() -> None:
    names = _names("Li-Fe-O", 5, fewest_elements=2)
    assert {"Li2O", "FeO", "Fe2O3", "LiFeO2"} <= set(names)
    assert not {"LiFeO2"}.isdisjoint(_names("Li-Fe-O", 5))
    assert "Li2O" not in _names("Li-Fe-O", 5)


@pytest.mark.parametrize(
    ("elements", "most_atoms", "message"),
    [
        (("Fe", "Al"), 12, "Fe-Al: no charges balance, as no element has a negative .*--formula"),
        (("Na",), 12, "Na: an element alone has no charges to balance"),
        (("Ar", "F"), 12, "Ar has no common oxidation state"),
        (("Al", "O"), 4, "in a formula of up to 4 atoms: allow more"),
        (("O", "O"), 12, "O-O: one of them stands there twice"),
        (("Li", "Fe", "P", "O", "F", "Mn", "Co"), 40, "too many formulas of up to 40 atoms"),
    ],
)
def test_why_there_is_none(elements: tuple[str, ...], most_atoms: int, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        balanced_formulas(elements, most_atoms)


def test_elements_without_a_token_are_refused() -> None:
    with pytest.raises(CIFError, match="element Po has no token"):
        balanced_formulas(("Po", "O"), 12)
