"""The card of the model in the package: what it was made of and how, and what it is worth."""

from collections.abc import Iterator
from pathlib import Path

from default_branch import Branch
from default_origin import Origin
from measure_default import TOP_K, Measured, reasons_of

from crystallm_jax.data.store import read_header
from crystallm_jax.model import ModelConfig
from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.provenance import training_command
from crystallm_jax.train_run.status import read_lines
from crystallm_jax.train_run.train_config import TrainConfig

LICENSE = "cc-by-4.0"


def make_card(
    branch: Branch,
    settings: TrainConfig,
    shape: ModelConfig,
    measured: Measured,
    *,
    origin: Origin,
    crystals: str,
    kept: str,
) -> ModelCard:
    """The card of a decay's end.

    Args:
        branch: the decay.
        settings: of the run that it was branched off.
        shape: of the model.
        measured: what it is worth.
        origin: what the run began from.
        crystals: what the records of the training set are, with their licence and credits.
        kept: which of its weights these are, and how the others compare.

    Raises:
        CrystallmError: the data or a log cannot be read.
    """
    tokens = origin.tokens + branch.last_step * settings.tokens_per_step
    data = _data(Path(settings.dataset), crystals, origin)
    parts = [
        "# Model card",
        "\n".join(
            f"- {name}: {text}"
            for name, text in (
                ("Shape", _shape(shape)),
                ("Data", data),
                ("Training", _training(branch, settings, tokens=tokens, origin=origin)),
                ("Weights", f"float16, {kept}"),
            )
        ),
        f"## How it was made\n\n{_made(branch, settings, origin)}",
        f"## What to expect\n\n{_worth(measured, shape)}",
    ]
    return ModelCard(
        license=LICENSE,
        data=data,
        training_command=_command(branch),
        metrics={"step": branch.last_step, "tokens": tokens, **dict(_metrics(measured))},
        text="\n\n".join(parts),
    )


def _shape(shape: ModelConfig) -> str:
    return (
        f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, context {shape.block_size:,} tokens; the"
        f" published vocabulary of {shape.vocab_size} tokens"
    )


def _data(dataset: Path, crystals: str, origin: Origin) -> str:
    counts = {name: split.records for name, split in read_header(dataset).splits.items()}
    held_out = " and ".join(
        f"{counts[split]:,} for {name}"
        for split, name in (("val", "validation"), ("test", "test"))
        if split in counts
    )
    text = f"{counts['train']:,} {crystals}; {held_out} were kept back"
    return f"{text}. It began from a model of: {origin.data}" if origin.data else text


def _training(branch: Branch, settings: TrainConfig, *, tokens: int, origin: Origin) -> str:
    before = "" if origin.init_from == "scratch" else f", after {origin.tokens:,} of {origin.init_from}"
    return (
        f"{branch.step:,} steps of {settings.tokens_per_step:,} tokens at a stable rate and {branch.decay_iters:,} of"
        f" decay to 0, in {_hours(branch):.1f} hours by the clock, beside other work and with its pauses; it has read"
        f" {tokens / 1e6:.1f} million tokens in all{before}"
    )


def _hours(branch: Branch) -> float:
    """That the run took up to the branch, and the decay."""
    stable = [line for line in read_lines(branch.run) if line["step"] <= branch.step]
    seconds = [lines[-1].get("elapsed_s") for lines in (stable, read_lines(branch.folder)) if lines]
    return sum(filter(None, seconds)) / 3600


def _made(branch: Branch, settings: TrainConfig, origin: Origin) -> str:
    begun = "" if origin.init_from == "scratch" else f", from the weights of {origin.init_from}"
    return (
        f"The stable run{begun}, which `python tools/train_default.py` goes on with whenever it is called, and the"
        " decay that `python tools/ship_default.py` branched off it:\n\n"
        f"    {training_command(settings)}\n    {_command(branch)}"
    )


def _command(branch: Branch) -> str:
    """The command of the decay, with the run in place of its settings."""
    return (
        f"crystallm train --config RUN/config.yaml out_dir=DECAY init_from=RUN/checkpoints/{branch.step} init_state=all"
        f" max_iters={branch.last_step} decay_iters={branch.decay_iters} min_lr=0"
    )


def _worth(measured: Measured, shape: ModelConfig) -> str:
    losses = [f"| {name} | {found.loss:.4f} | {found.targets:,} |" for name, found in measured.losses.items()]
    rows = [
        f"| {row.temperature} | {row.constrain or 'none'} | {row.valid} ({row.share:.1%}) | {reasons_of(row)} |"
        for row in measured.validity
    ]
    count = measured.validity[0].samples
    return "\n".join(
        [
            "Validation loss in nats a token, of whole files, each from its first token on:",
            "",
            "| validation set of | loss | tokens |",
            "| --- | --- | --- |",
            *losses,
            "",
            f"One sample for each of the first {count} test compositions of {measured.prompts}, without space group,"
            f" seed {measured.seed}, top-k {TOP_K}; valid means that formula, site multiplicities, bond lengths and"
            " space group all hold (symprec 0.1), every sample in the denominator:",
            "",
            "| temperature | `--constrain` | valid | first thing wrong with the others |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "It is small: a model to try the tools with, and a start for training. For research, train a larger one on"
            f" more, or load a published checkpoint. Structures of more than {shape.block_size:,} tokens do not fit its"
            " context.",
        ]
    )


def _metrics(measured: Measured) -> Iterator[tuple[str, float]]:
    for number, (name, found) in enumerate(measured.losses.items()):
        yield f"val_loss_{name}" if number else "val_loss", round(found.loss, 4)
    for row in measured.validity:
        held = f"_{row.constrain}" if row.constrain else ""
        yield f"valid_share{held}_{row.temperature}", round(row.share, 4)
