"""`crystallm info`: what a prepared folder or a model holds, and whether it is whole; of a run, where it stands."""

import argparse
import dataclasses
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from crystallm_jax.cif import ELEMENTS, SPACEGROUPS
from crystallm_jax.cif.spacegroups import CRYSTAL_SYSTEMS, crystal_system
from crystallm_jax.cli.run_info import show as show_run
from crystallm_jax.data.describe import SplitDescription, StoreDescription, describe, merged_histogram
from crystallm_jax.models.detect import is_model
from crystallm_jax.models.locate import is_name, locate
from crystallm_jax.train_run.names import is_run

_WIDTH = 100
_BARS = 16
_BAR_LENGTH = 40
_TOP = 12
_CELL = 5
# Rows of the periodic table: the first atomic number, elements on the left, the number after a gap, elements there.
_ROWS = (
    *(
        (1, 1, 2, 1),
        (3, 2, 5, 6),
        (11, 2, 13, 6),
        (19, 18, 0, 0),
        (37, 18, 0, 0),
        (55, 2, 72, 15),
        (87, 2, 104, 15),
    ),
    *((57, 0, 57, 15), (89, 0, 89, 15)),
)
_COLUMNS = 18
_JOINED = "\N{NO-BREAK SPACE}"


def run(arguments: argparse.Namespace) -> int:
    """Describe a folder; returns 1 if anything is wrong with it.

    Raises:
        DataError: the folder holds no tokens, or the picture cannot be written.
    """
    if is_run(Path(arguments.folder)):
        return show_run(arguments)
    if (model := _model(arguments.folder)) is not None:
        from crystallm_jax.cli.model_info import show as show_model  # noqa: PLC0415  needs JAX

        return show_model(arguments, model)
    found = describe(arguments.folder, verify=not arguments.no_verify)
    if arguments.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(report(found))
    if arguments.plot is not None and found.splits:
        from crystallm_jax.cli.length_plot import plot_lengths  # noqa: PLC0415  needs matplotlib

        plot_lengths(found, arguments.plot)
    return 1 if found.problems else 0


def _model(name: str) -> Path | None:
    """Where the model of this name lies, a run's checkpoint among them; None for what is no model."""
    path = Path(name)
    if path.exists():
        return path if is_model(path) else None
    return locate(name) if is_name(name) else None


def report(found: StoreDescription) -> str:
    """The description as text of at most 100 columns, but for what has no blank to break it at."""
    splits = tuple(found.splits.values())
    records, tokens = sum(split.records for split in splits), sum(split.tokens for split in splits)
    sections = [[f"{found.folder}: {_plural(records, 'record')}, {_plural(tokens, 'token')}"]]
    if splits:
        sections += [
            _table(found.splits),
            _histogram(splits),
            _elements(splits, records),
            _spacegroups(splits, records),
            _tokens(splits),
        ]
    sections += [list(_origin(found)), list(_verdict(found))]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in sections if lines) + "\n"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _table(splits: Mapping[str, SplitDescription]) -> list[str]:
    first = next(iter(splits.values()))
    header = ["", "records", "tokens", "shortest", "median", "mean", "95 %", "longest"]
    header += [f"> {context}" for context in first.lengths.longer] + ["<unk>", "marked"]
    rows = [header]
    for name, split in splits.items():
        lengths = split.lengths
        figures = (lengths.shortest, lengths.median, lengths.mean, lengths.p95, lengths.longest)
        longer = [_share(count, split.records) for count in lengths.longer.values()]
        row = [name, f"{split.records:,}", f"{split.tokens:,}", *(f"{figure:,.0f}" for figure in figures)]
        rows.append([*row, *longer, f"{split.unk:,}", f"{split.underrepresented:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        fields = [field.rjust(width) for field, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *fields]))
    return lines


def _share(count: int, total: int) -> str:
    share = 100 * count / max(total, 1)
    if 0 < share < 0.1:
        return "< 0.1 %"
    return f"{share:.1f} %"


def _bar(count: int, largest: int, length: int = _BAR_LENGTH) -> str:
    # What is there at all is seen.
    return "#" * max(round(length * count / max(largest, 1)), 1 if count else 0)


def _histogram(splits: Sequence[SplitDescription]) -> list[str]:
    """Records by length over all splits, in at most `_BARS` rows; the last takes the tail."""
    width, counts = merged_histogram(splits)
    longest = max(split.lengths.longest for split in splits)
    begin = next(i for i, count in enumerate(counts) if count)
    # As wide as lets all but the longest half per cent stand in rows of their own.
    total, seen, end = sum(counts), 0, begin
    while seen < 0.995 * total:
        seen += counts[end]
        end += 1
    step = -(-(end - begin) // (_BARS - 1))
    edges = [begin + i * step for i in range(_BARS) if begin + i * step < len(counts)]
    rows = [(low, sum(counts[low:high])) for low, high in zip(edges, [*edges[1:], None], strict=True)]
    largest = max(count for _, count in rows)
    size = len(f"{longest:,}")
    lines = ["records by length in tokens"]
    for low, count in rows:
        high = longest if low == edges[-1] else (low + step) * width - 1
        lines.append(f"  {low * width:>{size},} to {high:>{size},}  {count:>11,}  {_bar(count, largest)}")
    return lines


def _elements(splits: Sequence[SplitDescription], records: int) -> list[str]:
    """Records that contain each element, as the periodic table."""
    counts = _summed(split.elements for split in splits)
    cells = {ELEMENTS[symbol].number: (symbol, _short(count)) for symbol, count in counts.items() if count}
    lines = []
    for row in _table_rows():
        fields = [cells.get(number, ("", "")) if number else ("", "") for number in row]
        if any(symbol for symbol, _ in fields):
            lines += ["  " + "".join(field[part].rjust(_CELL) for field in fields) for part in (0, 1)]
    missing = [symbol for symbol, count in counts.items() if not count]
    top = _shares(counts, 10, records)
    lines = [f"records with each of the {len(cells)} elements (k: thousands, M: millions)", *lines]
    lines += _wrapped("  most common: ", top)
    return lines + _wrapped("  none with: ", " ".join(missing))


def _table_rows() -> Iterator[list[int]]:
    """Atomic numbers of each row of the periodic table, 0 for a gap; the two series stand below."""
    for first, left, after, right in _ROWS:
        series = first == after
        gap = 2 if series else _COLUMNS - left - right
        yield [*range(first, first + left), *[0] * gap, *range(after, after + right)]


def _short(count: int) -> str:
    """A count in at most four characters."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}" if count < 9.95 * size else f"{count / size:.0f}{letter}"
    return str(count)


def _summed(parts: "Iterable[Mapping[str, int]]") -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def _spacegroups(splits: Sequence[SplitDescription], records: int) -> list[str]:
    """Records by crystal system, and the most common space groups."""
    counts = _summed(split.spacegroups for split in splits)
    systems = dict.fromkeys(CRYSTAL_SYSTEMS, 0)
    for symbol, count in counts.items():
        systems[crystal_system(SPACEGROUPS[symbol])] += count
    without = sum(split.without_spacegroup for split in splits)
    shown = {**systems, **({"none named": without} if without else {})}
    largest = max(shown.values())
    lines = [f"records by crystal system ({len(counts)} of {len(SPACEGROUPS)} space groups occur)"]
    for name, count in shown.items():
        lines.append(f"  {name:<12}  {count:>11,}  {_share(count, records):>7}  {_bar(count, largest)}")
    return lines + _wrapped("  most common: ", _shares(counts, _TOP, records))


def _tokens(splits: Sequence[SplitDescription]) -> list[str]:
    """The most common tokens, and what is never seen; space groups have their own lines above."""
    counts = _summed(split.token_counts for split in splits)
    never = [token for token, count in counts.items() if not count]
    others = [token for token in never if not token.endswith("_sg")]
    groups = len(never) - len(others)
    lines = [f"tokens: {len(counts) - len(never)} of {len(counts)} occur"]
    lines += _wrapped("  most common: ", _shares(counts, _TOP, counts.total()))
    missing = [*map(_shown, others), *([f"and {groups} space groups"] if groups else [])]
    return lines + _wrapped("  never seen: ", " ".join(missing))


def _shares(counts: Counter[str], shown: int, total: int) -> str:
    """The most common of something, each with its share of the total."""
    parts = (f"{_shown(name)} {_share(n, total)}" for name, n in counts.most_common(shown) if n)
    return ", ".join(part.replace(" ", _JOINED) for part in parts)


def _shown(token: str) -> str:
    """A token as it is, a blank or line end in quotes."""
    return repr(token) if token.isspace() else token


def _wrapped(head: str, text: str) -> list[str]:
    """Lines of at most `_WIDTH` columns, those after the first indented to the head's end; none for no text."""
    lines = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_JOINED, " ") for line in lines]


def _origin(found: StoreDescription) -> Iterator[str]:
    """Where the records came from, how they were made, and what was dropped."""
    for i, source in enumerate(found.sources):
        yield f"{'made from' if i == 0 else '':<10}  {source}"
    if found.options:
        options = ", ".join(f"{key}={json.dumps(value)}" for key, value in found.options.items())
        yield from _wrapped(f"{'options':<10}  ", options)
    if found.versions:
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        yield from _wrapped(f"{'versions':<10}  ", versions)
    if found.counts:
        counts = ", ".join(f"{name} {count:,}" for name, count in found.counts.items())
        yield from _wrapped(f"{'counts':<10}  ", counts)
    for i, group in enumerate(found.dropped[:_TOP]):
        head = f"{'dropped' if i == 0 else '':<10}  {group.inputs:>9,}  {group.stage}: "
        yield from _wrapped(head, group.reason)
    if len(found.dropped) > _TOP:
        rest = sum(group.inputs for group in found.dropped[_TOP:])
        yield f"{'':<10}  {rest:>9,}  for {len(found.dropped) - _TOP:,} other reasons"
    for i, (name, split) in enumerate((n, s) for n, s in found.splits.items() if s.sha256):
        yield f"{'sha256' if i == 0 else '':<10}  {split.sha256}  {name}.bin"


def _verdict(found: StoreDescription) -> Iterator[str]:
    if found.problems:
        yield f"{_plural(len(found.problems), 'thing')} wrong:"
        yield from (f"  {problem}" for problem in found.problems)
    elif found.checked:
        yield "verified: checksums, starts, ids, totals and counts agree"
    elif found.format:
        yield "starts, ids, totals and counts agree; checksums were not compared (--no-verify)"
    else:
        yield "starts and ids are in order; published files have no checksums to compare"
