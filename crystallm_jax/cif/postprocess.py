"""From a model's text to an ordinary CIF."""

import re

from crystallm_jax.cif.spacegroups import spacegroup_operations
from crystallm_jax.cif.vocabulary import SPACEGROUP_TAG
from crystallm_jax.errors import CIFError

_SPACEGROUP = re.compile(rf"{SPACEGROUP_TAG}\s+(?:'([^']+)'|(\S+))")
_IDENTITY_LOOP = "loop_\n_symmetry_equiv_pos_site_id\n_symmetry_equiv_pos_as_xyz\n1 'x, y, z'"
_PROPERTY_BLOCK = re.compile(rf"(data_[^\n]*\n)loop_[\s\S]*?({SPACEGROUP_TAG})")


def named_spacegroup(text: str) -> str:
    """The space-group symbol that a CIF text names, without quotes.

    Raises:
        CIFError: the text names none.
    """
    match = _SPACEGROUP.search(text)
    if match is None:
        raise CIFError(f"the text has no {SPACEGROUP_TAG}: it may have been cut off before its space group")
    return str(match[1] or match[2])


def postprocess_cif(raw: str) -> str:
    """Make a decoded text an ordinary CIF, as the published post-processing does.

    The loop with the identity alone becomes the loop of all operations of the named space group, and the
    block of element properties goes. Only the order of the operations differs from the published one.

    Raises:
        CIFError: the text names no space group, or one that is not standard.
    """
    symbol = named_spacegroup(raw)
    if symbol != "P 1":
        operations = spacegroup_operations(symbol)
        lines = [f"  {i}  '{operation}'" for i, operation in enumerate(operations, 1)]
        loop = ["loop_", " _symmetry_equiv_pos_site_id", " _symmetry_equiv_pos_as_xyz", *lines]
        raw = raw.replace(_IDENTITY_LOOP, "\n".join(loop))
    # A block ends at a tag: behind the last one, each "data_" line would be searched from to the end of the text.
    end = raw.rfind(SPACEGROUP_TAG) + len(SPACEGROUP_TAG)
    return _PROPERTY_BLOCK.sub(r"\1\2", raw[:end]) + raw[end:]
