"""The picture of `crystallm info --plot`: how many records have how many tokens."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crystallm_jax.data.describe import CONTEXTS, StoreDescription, merged_histogram
from crystallm_jax.errors import DataError

_MOST_BARS = 96
_LARGEST_RATIO = 50
_TALL = 1.35


def plot_lengths(found: StoreDescription, path: Path) -> None:
    """Draw the lengths of the records of all splits; the file's ending says the format.

    Counts are on a logarithmic axis where few records are long and many short.

    Raises:
        DataError: the file cannot be written, or not in this format.
    """
    splits = tuple(found.splits.values())
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width, counts = merged_histogram(splits)
    step = -(-len(counts) // _MOST_BARS)
    bars = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    edges = [i * step * width for i in range(len(bars) + 1)]
    axes.stairs(bars, edges, fill=True, color="#4477aa")
    filled = [count for count in bars if count]
    logarithmic = max(filled) > _LARGEST_RATIO * min(filled)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(0.7, max(filled) ** _TALL)
    else:
        axes.set_ylim(0, max(filled) * _TALL)
    records = sum(split.records for split in splits)
    median = splits[0].lengths.median
    name = next(iter(found.splits))
    axes.axvline(
        median, color="#222222", linestyle="--", linewidth=1, label=f"median of {name}: {median:,.0f}"
    )
    for context, style in zip(CONTEXTS, (":", "-."), strict=True):
        if context < edges[-1]:
            longer = sum(split.lengths.longer[context] for split in splits)
            label = f"{context:,} tokens: {longer / records:.2%} are longer"
            axes.axvline(context, color="#aa3377", linestyle=style, linewidth=1, label=label)
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(f"records in {step * width} tokens")
    axes.set_title(f"{Path(found.folder).resolve().name}: {records:,} records", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize="small")
    try:
        figure.savefig(path, dpi=200)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be drawn ({reason}): give --plot a name such as out.png") from error
