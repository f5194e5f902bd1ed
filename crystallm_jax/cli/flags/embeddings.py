"""Flags of `crystallm embeddings`."""

import argparse
import re
from typing import Any

# As `DrawnKind` and `ProjectionName`, which need NumPy.
KINDS = ("atom", "digit", "spacegroup")
_PROJECTIONS = ("pca", "tsne")
DEFAULT_OUT = "embeddings"
_EXAMPLE = """\
examples:
  crystallm embeddings default
  crystallm embeddings ckpt.pt --kind spacegroup --projection tsne --out pictures
  crystallm embeddings crystallm_v1_small.atom_vectors.csv.gz --out pictures
  crystallm embeddings runs/mine --neighbours Na --neighbours Fm-3m --count 5
"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "embeddings",
        help="the vectors of elements, digits and space groups: files, pictures, neighbours",
        description="Write the vectors that a model has learned for its tokens in the published CSV layout, draw them"
        "\nin the plane (PNG, and a page in which one can point at a token), and say how well neighbours"
        "\nagree with the periodic table and the crystal systems.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="M",
        help="a model of any format, a file, folder or name, or a CSV file of vectors, also gzipped",
    )
    add(
        "--kind",
        action="append",
        choices=KINDS,
        help="of tokens; may be given several times (default: all three, or that of the CSV file)",
    )
    add(
        "--projection",
        choices=_PROJECTIONS,
        default="pca",
        help="principal components, or t-SNE over cosine distances, which needs scikit-learn:"
        " pip install 'crystallm-jax[embeddings]' (default: %(default)s)",
    )
    add(
        "--out",
        metavar="DIR",
        help="folder for NAME.atom_vectors.csv (number_vectors, spacegroup_vectors), NAME.KIND.png and NAME.KIND.html"
        f" (default: {DEFAULT_OUT}; with --neighbours nothing is written unless it is given)",
    )
    add(
        "--neighbours",
        action="append",
        default=[],
        metavar="TOKEN",
        help="print the nearest tokens by cosine; may be given several times; space groups with or without _sg,"
        " \\n for the line end",
    )
    add("--count", type=_count, default=10, metavar="N", help="of neighbours (default: %(default)s)")
    add(
        "--among",
        choices=("kind", "all"),
        default="kind",
        help="neighbours of the token's kind, or of the whole vocabulary (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object (default: text)")


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)
