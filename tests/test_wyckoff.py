"""Site classes: the International Tables' multiplicities, from the operations alone, and what crystals hold."""

import re

import pytest

from crystallm_jax.cif import CIFError, spacegroup_operations
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG, SPACEGROUPS, SPACEGROUPS_WITHOUT_TOKEN
from crystallm_jax.cif.wyckoff import SiteClass, derive_site_classes, site_classes
from crystallm_jax.data.corpus import read_corpus

# International Tables A: positions without free parameters by multiplicity, and multiplicities of the others.
KNOWN = {
    "P1": ({}, [1]),
    "P-1": ({1: 8}, [2]),
    "P2_1/c": ({2: 4}, [4]),
    "Pmmm": ({1: 8}, [2, 4, 8]),
    "Pna2_1": ({}, [4]),
    "P4mm": ({}, [1, 2, 4, 8]),
    "P4_2/mnm": ({2: 2, 4: 2}, [4, 8, 16]),
    "R-3m": ({3: 2, 9: 2}, [6, 18, 36]),
    "R-3c": ({6: 2, 18: 1}, [12, 18, 36]),
    "P6_3/mmc": ({2: 4, 6: 1}, [4, 6, 12, 24]),
    "Pm-3m": ({1: 2, 3: 2}, [6, 8, 12, 24, 48]),
    "Fm-3m": ({4: 2, 8: 1, 24: 1}, [24, 32, 48, 96, 192]),
    "Fd-3m": ({8: 2, 16: 2}, [32, 48, 96, 192]),
    "Ia-3d": ({16: 2, 24: 2}, [32, 48, 96]),
    "I-43d": ({12: 2}, [16, 24, 48]),
    "P4_132": ({4: 2}, [8, 12, 24]),
}


@pytest.mark.parametrize("symbol", KNOWN)
def test_classes_are_those_of_the_international_tables(symbol):
    fixed, free = KNOWN[symbol]
    expected = tuple(
        [SiteClass(multiplicity, count) for multiplicity, count in fixed.items()]
        + [SiteClass(multiplicity, None) for multiplicity in free]
    )
    assert site_classes(symbol) == expected
    assert derive_site_classes(spacegroup_operations(symbol)) == expected


def test_every_group_has_its_general_position_and_whole_orbits():
    groups = {**SPACEGROUPS, **SPACEGROUPS_WITHOUT_TOKEN}
    assert len(groups) == 230
    for symbol in groups:
        general = len(spacegroup_operations(symbol))
        classes = site_classes(symbol)
        assert SiteClass(general, None) in classes
        assert all(general % multiplicity == 0 for multiplicity, _ in classes)
        assert len(set(classes)) == len(classes)


def test_the_corpus_has_no_site_that_its_group_lacks():
    row = re.compile(r"^ +[A-Z][a-z]?  \S+  (\d+)  ", re.MULTILINE)
    tag = re.compile(rf"{SPACEGROUP_TAG}\s+'?([^'\n]+)'?")
    seen = set()
    for record in read_corpus():
        symbol = tag.search(record.text)[1].strip()
        present = {int(multiplicity) for multiplicity in row.findall(record.text)}
        assert present
        assert present <= {multiplicity for multiplicity, _ in site_classes(symbol)}, record.id
        seen.add(symbol)
    assert len(seen) > 50


def test_an_unknown_group_is_refused():
    with pytest.raises(CIFError, match="'Fm3m' has no known sites"):
        site_classes("Fm3m")
