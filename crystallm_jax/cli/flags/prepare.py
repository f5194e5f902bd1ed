"""Flags of `crystallm prepare`."""

import argparse

# As in `crystallm_jax.data.preparing.splits` and `.pipeline`, which are not imported for --help.
_PUBLISHED_SPLIT = (0.10, 0.0045)
_PUBLISHED_SEED = 20230610
_STAGES = ("symmetrise", "preprocess", "tokenise")
_EXAMPLE = """\
INPUT, told by content: a folder of CIFs or a .cif file; a .zip, .tar or .tar.gz of CIFs; a .csv with a column 'cif';
.jsonl, .parquet (needs the extra 'parquet') with 'cif', 'structure' or the columns of LeMaterial; .extxyz; the
published .pkl.gz lists and tokens_*.tar.gz; or `embedded`, the corpus in the package. Compressed ones too.

A run that was killed goes on where it was when the same command is given again.

examples:
  crystallm prepare structures.csv.gz more_cifs/ --out data/mine --dedup --split
  crystallm prepare train.csv --val val.csv --test test.csv --out data/benchmark
  crystallm prepare *.parquet --exclude mpts_52_test.csv --dedup --split --split-by formula --out data/new
The published cifs_v1_orig.pkl.gz is symmetrised already; one stage alone writes texts, which the next one reads:
  crystallm prepare cifs_v1_orig.pkl.gz --stages preprocess,tokenise --dedup --split --out data/v1
  crystallm prepare cifs_v1_orig.pkl.gz --stages none --dedup --out data/v1_dedup
  crystallm prepare data/v1_dedup/train.jsonl.gz --stages preprocess,tokenise --split --out data/v1
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "prepare",
        help="structures → standardised CIF text → tokens on disk",
        description="Turn crystal structures into tokens that a model trains on.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="structures, in this order")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--val", nargs="+", default=[], metavar="INPUT", help="the validation set, if it is apart")
    add("--test", nargs="+", default=[], metavar="INPUT", help="the test set, if it is apart")
    _add_record_flags(parser.add_argument_group("what becomes of a record"))
    _add_choice_flags(parser.add_argument_group("which records stay, in this order"))
    _add_set_flags(parser.add_argument_group("where they go"))
    _add_execution_flags(parser.add_argument_group("how"))
    return parser


def _add_record_flags(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--stages",
        type=_stages,
        default=_STAGES,
        metavar="LIST",
        help=f"of {','.join(_STAGES)} (default: all three); without tokenise the texts are written, as "
        "SPLIT.jsonl.gz; 'none' leaves them as they are",
    )
    add("--symprec", type=float, default=0.1, help="tolerance of symmetry in Å (default: %(default)s)")
    add(
        "--decimal-places",
        type=int,
        default=4,
        metavar="N",
        help="of numbers in the text (default: %(default)s)",
    )
    add(
        "--oxidation-states",
        action="store_true",
        help="add them to the table of element properties, from the CIF or guessed (default: no)",
    )


def _add_choice_flags(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--merge",
        action="store_true",
        help="of records with the same (reduced formula, Z, space group) keep the first (default: keep all)",
    )
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="leave out every structure of these inputs, a benchmark for instance",
    )
    add(
        "--exclude-by",
        choices=("structure", "formula"),
        default="structure",
        help="the same (reduced formula, Z, space group), or the same reduced formula (default: %(default)s)",
    )
    add(
        "--dedup",
        action="store_true",
        help="of records with the same cell formula and space group keep the lowest volume a formula unit "
        "(default: keep all)",
    )


def _add_set_flags(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--split",
        nargs="?",
        type=_sizes,
        const=_PUBLISHED_SPLIT,
        metavar="VAL,TEST",
        help="set shares, or numbers of records, aside for validation and test (default: no split; with the bare "
        "flag 0.1,0.0045, as published)",
    )
    add(
        "--split-by",
        choices=("random", "formula", "spacegroup"),
        default="random",
        help="formula: no reduced formula in two sets; spacegroup: each in every set in the same share "
        "(default: %(default)s, as published)",
    )
    add(
        "--underrepresented",
        metavar="FILE",
        help="mark the (composition, spacegroup) pairs of this CSV or published .pkl, for underrep_p in training",
    )
    add(
        "--underrepresented-below",
        type=int,
        metavar="N",
        help="mark the records of space groups that have fewer than N in their set",
    )
    add(
        "--shuffle",
        action="store_true",
        help="write in an order drawn from the seed (default: that of the input)",
    )
    add(
        "--seed",
        type=int,
        default=_PUBLISHED_SEED,
        help="of the split and the order (default: %(default)s, as published)",
    )


def _add_execution_flags(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes; 0 for none, and no time limit (default: one a usable core)",
    )
    add(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds a structure (default: %(default)s)",
    )
    add(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="this machine, or a Ray cluster whose nodes have the package (extra 'ray'; default: %(default)s)",
    )
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="of the cluster (default: RAY_ADDRESS, or one on this machine)",
    )


def _stages(text: str) -> tuple[str, ...]:
    stages = () if text == "none" else tuple(text.split(","))
    for stage in stages:
        if stage not in _STAGES:
            raise argparse.ArgumentTypeError(
                f"{stage!r} is no stage: give some of {','.join(_STAGES)}, or none"
            )
    return stages


def _sizes(text: str) -> tuple[float, float]:
    try:
        val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not VAL,TEST: give two shares or two numbers, such as 0.1,0.0045"
        ) from None
    return val, test
