"""`crystallm prepare`: structures → standardised CIF text → tokens on disk."""

import argparse
import sys
from typing import TYPE_CHECKING

from crystallm_jax.errors import ConfigError

if TYPE_CHECKING:
    from crystallm_jax.data.prepare import PrepareReport

_SHOWN_REASONS = 10
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
    parser.set_defaults(run=run)
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


def run(args: argparse.Namespace) -> int:
    """Prepare and say what became of the input; returns the exit code.

    Raises:
        DataError: as `crystallm_jax.data.prepare.prepare`.
        ConfigError: likewise.
    """
    # Here, not above: they need pymatgen, which --help does not.
    from crystallm_jax.data.prepare import prepare  # noqa: PLC0415
    from crystallm_jax.data.preparing.executors import Execution  # noqa: PLC0415
    from crystallm_jax.data.preparing.pipeline import Recipe  # noqa: PLC0415
    from crystallm_jax.data.preparing.selection import Selection  # noqa: PLC0415
    from crystallm_jax.data.preparing.splits import Split  # noqa: PLC0415

    _refuse_idle_flags(args)
    report = prepare(
        args.inputs,
        args.out,
        val_inputs=args.val,
        test_inputs=args.test,
        exclude_inputs=args.exclude,
        underrepresented=args.underrepresented,
        recipe=Recipe(args.stages, args.symprec, args.decimal_places, args.oxidation_states),
        selection=Selection(
            merge=args.merge,
            exclude_by=args.exclude_by,
            dedup=args.dedup,
            split=None if args.split is None else Split(args.split[0], args.split[1], args.split_by),
            underrepresented_below=args.underrepresented_below,
            shuffle=args.shuffle,
            seed=args.seed,
        ),
        execution=Execution(args.workers, args.time_limit, args.executor, args.ray_address),
    )
    sys.stdout.write(summary(report))
    return 0


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    """Refuse a flag that would do nothing without another."""
    for flag, idle, needed in (
        (f"--split-by {args.split_by}", args.split_by != "random" and args.split is None, "--split"),
        (f"--exclude-by {args.exclude_by}", args.exclude_by != "structure" and not args.exclude, "--exclude"),
        ("--ray-address", args.ray_address is not None and args.executor != "ray", "--executor ray"),
    ):
        if idle:
            raise ConfigError(f"{flag} does nothing alone: give {needed} too, or leave it out")


def summary(report: "PrepareReport") -> str:
    """What a run prints at its end."""
    done = report.n_input + report.n_excluding - report.resumed_at
    lines = [
        f"{report.n_input:,} structures read, {report.n_kept:,} kept, {report.n_dropped:,} dropped, "
        f"in {report.seconds:.0f} s ({done / max(report.seconds, 1e-9):.0f}/s)"
    ]
    if report.resumed_at:
        lines.append(f"  {report.resumed_at:,} of them were done by a run before this one")
    shown = list(report.reasons.items())[:_SHOWN_REASONS]
    lines += [f"  dropped {count:>7,}  {stage}: {reason}" for (stage, reason), count in shown]
    if len(report.reasons) > len(shown):
        others = report.n_dropped - sum(count for _, count in shown)
        lines.append(f"  dropped {others:>7,}  for {len(report.reasons) - len(shown)} other reasons")
    if report.n_dropped:
        lines.append(f"  each dropped input stands in {report.out_dir / 'dropped.csv'}")
    if report.n_excluding:
        lines.append(
            f"  {report.n_excluding:,} structures to exclude, {len(report.unusable):,} of them unusable"
        )
        lines += [f"    {drop.id}: {drop.stage}: {drop.reason}" for drop in report.unusable[:_SHOWN_REASONS]]
    if report.n_underrepresented:
        lines.append(f"  {report.n_underrepresented:,} records are marked as under-represented")
    lines += [
        f"{name + '.bin':<9} {split.records:>8,} records {split.tokens:>12,} tokens, up to {split.longest:,}"
        for name, split in report.splits.items()
    ]
    lines += [f"{name + '.jsonl.gz':<14} {count:>8,} texts" for name, count in report.texts.items()]
    if report.splits:
        lines += [
            f"{report.n_tokens:,} tokens in {report.out_dir}",
            f"next: crystallm train --config configs/small.yaml dataset={report.out_dir} out_dir=runs/small",
        ]
    return "\n".join(lines) + "\n"


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
