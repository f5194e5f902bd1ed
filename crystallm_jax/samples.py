"""A sample of a model, whatever computed it, and what can be made of its text."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

# What judges is loaded when it is asked for: it needs pymatgen.
from crystallm_jax import evaluation
from crystallm_jax.cif import CIFError, postprocess_cif

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from crystallm_jax.evaluation import ValidityReport

# What the published tool puts above a text that it could not post-process.
WARNING_LINE = "# WARNING: this text could not be post-processed"


@dataclass(frozen=True)
class Sample:
    """One generated text and what can be made of it.

    Attributes:
        prompt_index: which prompt, in the order given.
        sample_index: which of its samples.
        token_ids: prompt and generated tokens.
        text: the same as text, as the model wrote it.
        log_prob: log-probability in nats of what was generated (temperature 1, all tokens).
        finished: whether the text came to its end; otherwise a limit cut it.
        seconds: from its beginning in a batch to its end.
        returns: how often it went back, as its cell or a site could not stay (`constrain="positions"`).
        unplaced: whether it was given up, as its atoms found no place; it is not finished then.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    text: str
    log_prob: float
    finished: bool
    seconds: float = field(default=0.0, compare=False)
    returns: int = 0
    unplaced: bool = False

    @cached_property
    def cif(self) -> str:
        """An ordinary CIF: symmetry operators restored, property block removed; under a warning line if impossible."""
        try:
            return postprocess_cif(self.text)
        except CIFError:
            return f"{WARNING_LINE}\n{self.text}"

    def structure(self) -> "Structure":
        """The crystal as a pymatgen Structure.

        Raises:
            CIFError: the text does not describe one.
        """
        return evaluation.parse_structure(self.cif)

    def validate(self) -> "ValidityReport":
        """The verdicts on it."""
        return evaluation.validate(self.cif)
