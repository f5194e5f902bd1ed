"""The folder of a sampling run: CIFs, tables, structures for other programs, and how they came about."""

from crystallm_jax.sample_run.run import sample_into
from crystallm_jax.sample_run.run_folder import ResultsFolder
from crystallm_jax.sample_run.sample_tables import Totals
from crystallm_jax.sample_run.summary import Session, Summary
from crystallm_jax.sample_run.targets import DEFAULT_TRIES, ValidTarget

__all__ = ["DEFAULT_TRIES", "ResultsFolder", "Session", "Summary", "Totals", "ValidTarget", "sample_into"]
