"""`crystallm prepare`: structures → standardised CIF text → tokens on disk."""

import argparse
import sys

from crystallm_jax.data.prepare import PrepareReport, prepare
from crystallm_jax.data.preparing.executors import Execution
from crystallm_jax.data.preparing.pipeline import Recipe
from crystallm_jax.data.preparing.selection import Selection
from crystallm_jax.data.preparing.splits import Split
from crystallm_jax.errors import ConfigError

_SHOWN_REASONS = 10


def run(args: argparse.Namespace) -> int:
    """Prepare and say what became of the input; returns the exit code.

    Raises:
        DataError: as `crystallm_jax.data.prepare.prepare`.
        ConfigError: likewise.
    """
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


def summary(report: PrepareReport) -> str:
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
