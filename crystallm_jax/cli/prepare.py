"""`crystallm prepare`: structures → standardised CIF text → tokens on disk."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crystallm_jax.data.prepare import PrepareReport

_SHOWN_REASONS = 10
# As in `crystallm_jax.data.prepare`, which is not imported for --help.
_PUBLISHED_SPLIT = (0.10, 0.0045)
_PUBLISHED_SEED = 20230610

_EXAMPLE = """\
INPUT is a folder of .cif files, one .cif file, a .csv (also gzipped or xz-compressed) with a column 'cif', or
`embedded`, the corpus in the package.

examples:
  crystallm prepare structures.csv.gz more_cifs/ --out data/mine --dedup --split
  crystallm prepare train.csv --val val.csv --test test.csv --out data/benchmark
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
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="structures, in this order")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="of records with the same cell formula and space group keep the lowest volume a formula unit "
        "(default: keep all)",
    )
    parser.add_argument(
        "--val", nargs="+", default=[], metavar="INPUT", help="the validation set, if it is apart"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="INPUT", help="the test set, if it is apart")
    parser.add_argument(
        "--split",
        nargs="?",
        type=_fractions,
        const=_PUBLISHED_SPLIT,
        metavar="VAL,TEST",
        help="set fractions aside for validation and test (default: no split; with the bare flag 0.1,0.0045, "
        "as published)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=_PUBLISHED_SEED,
        help="seed of the split (default: %(default)s, as published)",
    )
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="processes, 0 for none (default: one a usable core)"
    )
    parser.add_argument(
        "--symprec", type=float, default=0.1, help="tolerance of symmetry in Å (default: %(default)s)"
    )
    parser.add_argument(
        "--decimal-places",
        type=int,
        default=4,
        metavar="N",
        help="of numbers in the text (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds a structure (default: %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepare and say what became of the input; returns the exit code.

    Raises:
        DataError: as `crystallm_jax.data.prepare.prepare`.
    """
    from crystallm_jax.data.prepare import prepare  # noqa: PLC0415  needs pymatgen, --help does not

    report = prepare(
        args.inputs,
        args.out,
        workers=args.workers,
        symprec=args.symprec,
        decimal_places=args.decimal_places,
        dedup=args.dedup,
        split=args.split,
        val_inputs=args.val,
        test_inputs=args.test,
        seed=args.seed,
        time_limit=args.time_limit,
    )
    sys.stdout.write(summary(report))
    return 0


def summary(report: "PrepareReport") -> str:
    """What a run prints at its end."""
    rate = report.n_input / max(report.seconds, 1e-9)
    lines = [
        f"{report.n_input:,} structures read, {report.n_kept:,} kept, {report.n_dropped:,} dropped, "
        f"in {report.seconds:.0f} s ({rate:.0f}/s)"
    ]
    shown = list(report.reasons.items())[:_SHOWN_REASONS]
    lines += [f"  dropped {count:>7,}  {stage}: {reason}" for (stage, reason), count in shown]
    if len(report.reasons) > len(shown):
        others = report.n_dropped - sum(count for _, count in shown)
        lines.append(f"  dropped {others:>7,}  for {len(report.reasons) - len(shown)} other reasons")
    if report.n_dropped:
        lines.append(f"  each dropped input stands in {report.out_dir / 'dropped.csv'}")
    lines += [
        f"{name + '.bin':<9} {split.records:>8,} records {split.tokens:>12,} tokens, up to {split.longest:,}"
        for name, split in report.splits.items()
    ]
    lines.append(f"{report.n_tokens:,} tokens in {report.out_dir}")
    lines.append(
        f"next: crystallm train --config configs/small.yaml dataset={report.out_dir} out_dir=runs/small"
    )
    return "\n".join(lines) + "\n"


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0: give a number of processes")
    return number


def _fractions(text: str) -> tuple[float, float]:
    try:
        val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not VAL,TEST: give two fractions, such as 0.1,0.0045"
        ) from None
    if not (0 < val < 1 and 0 < test < 1):
        raise argparse.ArgumentTypeError(f"{text!r}: both fractions lie between 0 and 1, such as 0.1,0.0045")
    return val, test
