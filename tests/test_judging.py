"""What a worker makes of a text beside its verdicts: a frame and a symmetrised CIF of the same structure."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ase.io
import pytest

from crystallm_jax.cif import symmetrized_cif
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation import ValidatorPool, parse_structure, validate
from crystallm_jax.evaluation import judging as judging_module
from crystallm_jax.evaluation.judging import frame_text, judge


@pytest.fixture(scope="module")
def salt(fixtures: Path) -> str:
    return (fixtures / "validity" / "rock_salt.cif").read_text()


def test_the_verdicts_are_those_of_validate_and_the_texts_those_of_the_structure(
    fixtures: Path,
) -> None:
    for file in sorted((fixtures / "validity").iterdir()):
        text = file.read_text(encoding="utf-8")
        judgement = judge(text)
        assert judgement.report == validate(text)
        if file.name.endswith(".cif"):
            structure = parse_structure(text)
            assert judgement.frame == frame_text(structure)
            assert judgement.symmetrized == symmetrized_cif(structure, 0.1)
            assert judgement.omitted is None


def test_a_frame_is_read_by_ase(salt: str, tmp_path: Path) -> None:
    structure = parse_structure(salt)
    (tmp_path / "one.extxyz").write_text(frame_text(structure) * 2)
    frames = ase.io.read(tmp_path / "one.extxyz", index=":")
    assert len(frames) == 2
    assert frames[0].get_chemical_symbols() == [site.specie.symbol for site in structure]
    assert frames[0].positions == pytest.approx(structure.cart_coords, abs=1e-7)
    assert frames[0].cell[:] == pytest.approx(structure.lattice.matrix, abs=1e-7)
    assert frames[0].pbc.all()


def test_what_other_programs_cannot_take_is_left_out_and_said(salt: str) -> None:
    disordered = judge(salt.replace(" 1.0\n", " 0.5\n").replace(" 1\n", " 0.5\n"))
    assert disordered.frame is None
    assert disordered.symmetrized is None
    assert disordered.omitted is not None
    assert "no frame: a site is partly occupied; not symmetrised: site 0 holds" in disordered.omitted
    assert judge("nonsense") == (validate("nonsense"), None, None, None)


def test_a_library_that_fails_on_a_structure_costs_only_what_it_makes(
    salt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise ZeroDivisionError("a flat cell")

    monkeypatch.setattr(judging_module, "symmetrized_cif", broken)
    judgement = judge(salt)
    assert judgement.report.valid
    assert judgement.frame is not None
    assert judgement.omitted == "not symmetrised: ZeroDivisionError: a flat cell"


def test_a_verdict_that_took_too_long_leaves_the_structure_alone(salt: str) -> None:
    judgement = judge(salt, time_limit=1e-9)
    assert "timeout" in judgement.report.reasons
    assert (judgement.frame, judgement.symmetrized) == (None, None)


def test_a_pool_judges_and_stands_in_for_workers_that_die(salt: str) -> None:
    with ValidatorPool(workers=1) as pool:
        future: Future[Any] = pool.judge(salt)
        assert future.result(60) == judge(salt)

    def interrupted() -> None:
        with pool:
            waiting.append(pool.judge(salt))
            raise KeyboardInterrupt

    waiting: list[Future[Any]] = []
    pool = ValidatorPool(workers=1)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    stopped = waiting[0].result(10)
    assert stopped.report.reasons == ("crashed",)
    assert (stopped.frame, stopped.symmetrized, stopped.omitted) == (None, None, None)


def test_disordered_structures_make_no_frame(salt: str) -> None:
    structure = parse_structure(salt)
    structure[0] = {"Na": 0.5}
    with pytest.raises(CIFError, match="partly occupied"):
        frame_text(structure)
