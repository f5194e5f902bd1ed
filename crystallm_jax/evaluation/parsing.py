"""CIF text to pymatgen structure, once, within limits that keep hostile text from hanging the process."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pymatgen.core import Structure
from pymatgen.core.operations import SymmOp
from pymatgen.io.cif import CifBlock, CifParser

from crystallm_jax.data.reading.guards import check_lattice, check_transformation, count_sites
from crystallm_jax.errors import CIFError
from crystallm_jax.evaluation.verdict import one_line

MAX_CHARACTERS = 1_000_000
MAX_LINE = 1_000  # pymatgen's pattern for quoted values takes quadratic time in the length of a line
MAX_BLOCKS = 100
MAX_SITES = 1_000
MAX_IMAGES = 20_000  # rows × operators; each is a step of Python in pymatgen
MAX_LENGTH = 10_000.0  # Å

NUMPY_NUMBER = re.compile(r"np\.float64\(([^)]*)\)")
DATA_LINE = re.compile(r"^\s*data_", re.MULTILINE)


class TooLargeError(CIFError):
    """A text whose structure would take more time or memory than a crystal of a plausible size."""


@dataclass(frozen=True)
class ParsedCIF:
    """The data blocks of a CIF text, read but not yet expanded by symmetry.

    Attributes:
        parser: pymatgen's parser, which holds the blocks.
        blocks: Header to items of each block; looped items are lists.
    """

    parser: CifParser
    blocks: Mapping[str, Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        """The items of the first block."""
        return next(iter(self.blocks.values()))


def parse_blocks(text: str) -> ParsedCIF:
    """Reads the data blocks of a CIF text.

    Raises:
        TooLargeError: More than 1,000,000 characters or 100 blocks.
        CIFError: The text is no CIF, or a line of it has more than 1,000 characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLargeError(
            f"the text has {len(text):,} characters: at most {MAX_CHARACTERS:,} are read; shorten it"
        )
    # pymatgen drops blank lines too, but only after a search that takes quadratic time in their number.
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    longest = max(map(len, lines), default=0)
    if longest > MAX_LINE:
        raise CIFError(
            f"a line has {longest:,} characters: a CIF has at most 2,048, this reader {MAX_LINE:,}"
        )
    text = "\n".join(lines)
    count = len(DATA_LINE.findall(text))
    if count > MAX_BLOCKS:
        raise TooLargeError(f"the text has {count:,} data blocks: at most {MAX_BLOCKS} are read; split it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser = CifParser.from_str(text, check_cif=False)
            blocks = parser.as_dict()
        except Exception as error:  # the parser raises whatever a broken text makes it stumble over
            raise CIFError(
                f"the text cannot be read as a CIF ({describe(error)}): check its syntax"
            ) from error
    if not blocks:
        raise CIFError("the text has no data block: a CIF starts with a line data_NAME")
    return ParsedCIF(parser, blocks)


def build_structure(parsed: ParsedCIF) -> tuple[Structure, list[SymmOp]]:
    """Expands the first complete block by its symmetry operators.

    Returns:
        The structure, all sites of the cell, and the operators of all blocks.

    Raises:
        TooLargeError: More than 1,000 sites, 20,000 images to compare or a cell longer than 10,000 Å.
        CIFError: No block holds a structure.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            operators = _check_size(parsed)
            structure = parsed.parser.parse_structures(primitive=False)[0]
        except CIFError:
            raise
        except Exception as error:  # as above
            reason = _first_problem(parsed.parser) or describe(error)
            raise CIFError(
                f"the CIF holds no structure ({reason}): check cell, operators and sites"
            ) from error
    check_lattice(structure.lattice)
    lengths = structure.lattice.abc
    if max(lengths) > MAX_LENGTH:
        raise TooLargeError(f"a cell length is {max(lengths):g} Å: at most {MAX_LENGTH:g} Å are handled")
    if len(structure) > MAX_SITES:
        raise TooLargeError(f"the cell holds {len(structure):,} sites: at most {MAX_SITES:,} are handled")
    return structure, operators


def parse_structure(text: str) -> Structure:
    """The structure of a CIF text, all sites of the cell as given.

    Raises:
        CIFError: The text holds no structure, or one beyond the limits of this module.
    """
    return build_structure(parse_blocks(text))[0]


def describe(error: BaseException) -> str:
    """An exception in one line, its class first."""
    message = one_line(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _check_size(parsed: ParsedCIF) -> list[SymmOp]:
    """The operators of all blocks, once it is sure that expanding the blocks by them ends soon."""
    operators: list[SymmOp] = []
    images = sites = 0
    for items in parsed.blocks.values():
        check_transformation(items)
        rows = _rows(items)
        if not rows:
            continue
        found = parsed.parser.get_symops(CifBlock(dict(items), [], ""))
        operators += found
        images += rows * len(found)
        if images > MAX_IMAGES:
            raise TooLargeError(
                f"{rows:,} rows under {len(found)} operators make {images:,} images: "
                f"at most {MAX_IMAGES:,} are handled"
            )
        sites += count_sites(items, found)
        # The count is rough where images nearly coincide; the exact one is taken after the expansion.
        if sites > 2 * MAX_SITES:
            raise TooLargeError(f"the cell would hold {sites:,} sites: at most {MAX_SITES:,} are handled")
    return operators


def _rows(items: Mapping[str, Any]) -> int:
    labels = items.get("_atom_site_label", ())
    return len(labels)


def _first_problem(parser: CifParser) -> str:
    """What pymatgen noted about the block that it could not expand, in one line."""
    for warning in parser.warnings:
        if warning.startswith("No structure parsed"):
            return one_line(NUMPY_NUMBER.sub(r"\1", warning.partition("\n")[2]))
    return ""
