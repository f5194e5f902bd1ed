"""The pool of validators: order, limits, workers that die."""

import os
import subprocess
import sys
import time

import pytest

from crystallm_jax.errors import ConfigError
from crystallm_jax.evaluation import ValidatorPool, validate, validate_many
from crystallm_jax.evaluation import pool as pool_module


@pytest.fixture(scope="module")
def texts(fixtures):
    return {path.stem: path.read_text(encoding="utf-8") for path in (fixtures / "validity").iterdir()}


def test_reports_come_in_order_and_equal_those_of_this_process(texts):
    several = [texts["rutile"], "", texts["rock_salt_raw"], "data_Na\nloop_", texts["rock_salt"]] * 5
    reports = list(validate_many(iter(several), workers=2))
    assert reports == [validate(text) for text in several[:5]] * 5
    assert [report.valid for report in reports[:5]] == [True, False, True, False, True]


def test_a_generator_is_read_only_a_little_ahead(texts):
    read = []

    def source():
        for index in range(10_000):
            read.append(index)
            yield texts["rutile"]

    reports = validate_many(source(), workers=1)
    for _ in range(3):
        assert next(reports).valid
    reports.close()
    assert len(read) <= pool_module.AHEAD + 3


def test_workers_that_die_or_hang_are_replaced(texts, monkeypatch):
    monkeypatch.setattr(pool_module, "GRACE", 0.0)
    with ValidatorPool(workers=1, time_limit=1.5) as pool:
        died = pool._schedule(os._exit, 3)
        hung = pool._schedule(time.sleep, 600)
        raised = pool._schedule(bytes, -1)
        greedy = pool._schedule(bytearray, 16 * 1024**3)
        judged = pool.submit(texts["rutile"])
        assert died.result(60).reasons == ("crashed",)
        assert "exit code 3" in died.result().error
        assert hung.result(60).reasons == ("timeout",)
        assert raised.result(60).reasons == ("crashed",)
        assert "ValueError" in raised.result().error
        if sys.platform == "linux":
            assert "MemoryError" in greedy.result(60).error
        assert judged.result(60).valid


def test_an_error_stops_the_workers_at_once():
    waiting = []

    def interrupted():
        with ValidatorPool(workers=1) as pool:
            waiting.append(pool._schedule(time.sleep, 600))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert waiting[0].result(10).reasons == ("crashed",)
    assert "stopped" in waiting[0].result().error


def test_a_worker_has_one_thread_and_no_jax():
    with ValidatorPool(workers=1) as pool:
        report = pool._schedule(
            eval, "[__import__('sys').modules.get('jax'), __import__('os').environ['OMP_NUM_THREADS']]"
        )
        assert report.result(60) == [None, os.environ.get("OMP_NUM_THREADS", "1")]


def test_a_pool_needs_no_pymatgen_and_no_jax_in_this_process():
    code = (
        "import sys, crystallm_jax.evaluation.pool; "
        "print([name for name in ('jax', 'pymatgen', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("workers", "time_limit"), [(0, 60.0), (-1, 60.0), (1, 0.0), (1, float("nan"))])
def test_impossible_settings_are_refused(workers, time_limit):
    with pytest.raises(ConfigError, match="use"):
        ValidatorPool(workers, time_limit)
