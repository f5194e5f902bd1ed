"""What `make demo` does: samples crystals from the model in the package, draws them, and trains a small model.

Everything goes through the commands that a user would type; they are printed as they run.
"""

import csv
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from ase.io import read
from ase.visualize.plot import plot_atoms

from crystallm_jax.cli import main as crystallm

MARKER = ".made_by_make_demo"
COMPOSITIONS = (
    "Na4Cl4",
    "K4Br4",
    "Li4F4",
    "Mg4O4",
    "Ti4O8",
    "Zn2S2",
    "Ca4F8",
    "Ba1Ti1O3",
    "Sr1Ti1O3",
    "La4Al4O12",
    "Mg8Al16O32",
    "Ga4As4",
    "Cs1Pb1I3",
    "Ni4Al4",
    "Fe4S8",
    "Li4Fe4P4O16",
)
SAMPLES_EACH = 4
# The model in the package is small: it is right more often where it is sure.
TEMPERATURE = 0.5
DRAWN = 12


def main() -> int:
    """Run the demo into the folder that is named on the command line."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo_out")
    begun = time.perf_counter()
    make_room(out)
    prompts = out / "compositions.txt"
    prompts.write_text("".join(f"{composition}\n" for composition in COMPOSITIONS))
    samples, training = out / "samples", out / "training"
    settings = (
        "--num-samples",
        SAMPLES_EACH,
        "--temperature",
        TEMPERATURE,
        "--seed",
        1,
        "--constrain",
        "positions",
    )
    run("sample", "--prompts", prompts, *settings, "--out", samples)
    drawn = draw_crystals(samples, out / "crystals.png")
    run("train", "--config", "tiny", f"out_dir={training}")
    draw_losses(training, out / "training.png")
    print(
        f"""
Done in {(time.perf_counter() - begun) / 60:.1f} minutes. In {out}:
  samples/cifs/        {len(COMPOSITIONS) * SAMPLES_EACH} generated crystals
  samples/samples.csv  which of them are valid, and what is wrong with the others
  crystals.png         {drawn} of the valid ones
  training/            a small model trained on the embedded corpus; training.png shows its loss
Next:
  .venv/bin/crystallm sample --composition Ca4Ti4O12 --num-samples 8 --out perovskite
  .venv/bin/crystallm prepare YOUR_CIFS/ --out data/mine --split
  .venv/bin/crystallm train --config tiny dataset=data/mine out_dir=runs/mine"""
    )
    return 0


def make_room(out: Path) -> None:
    """Make the folder; what an earlier demo left in it goes, anything else stays and is refused."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            sys.exit(f"{out}: holds files that no demo made; move it away")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def run(*arguments: object) -> None:
    """Run one command as a user would, and stop where it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ crystallm {shlex.join(words)}", flush=True)
    code = crystallm(words)
    if code:
        sys.exit(code)


def draw_crystals(samples: Path, picture: Path) -> int:
    """Draw valid crystals, one a composition first, the likeliest a token first; returns their number."""
    with (samples / "samples.csv").open(newline="") as file:
        rows = {(row["id"], int(row["sample"])): row for row in csv.DictReader(file)}
    frames = [atoms for atoms in read(samples / "structures.extxyz", index=":") if atoms.info["valid"]]
    ranked = sorted(frames, key=lambda atoms: atoms.info["log_prob"], reverse=True)
    seen: dict[str, int] = {}
    order = []
    for atoms in ranked:
        seen[atoms.info["id"]] = seen.get(atoms.info["id"], -1) + 1
        order.append((seen[atoms.info["id"]], atoms))
    chosen = [atoms for _, atoms in sorted(order, key=lambda pair: pair[0])][:DRAWN]
    columns = 4
    figure, axes = plt.subplots(3, columns, figsize=(12, 9.6))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, atoms in zip(axes.flat, chosen, strict=False):
        plot_atoms(atoms, axis, rotation="12x,-18y,4z", radii=0.35)
        row = rows[atoms.info["id"], int(atoms.info["sample"])]
        spacegroup = stated_spacegroup(samples / row["file"])
        axis.set_title(f"{atoms.get_chemical_formula('metal')}  {spacegroup}", fontsize=11)
    figure.suptitle("Generated crystals, all four checks passed")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return len(chosen)


def stated_spacegroup(cif: Path) -> str:
    """The space-group symbol in a CIF that is known to be valid."""
    tag = "_symmetry_space_group_name_H-M"
    return next(line.split()[1] for line in cif.read_text().splitlines() if line.startswith(tag))


def draw_losses(training: Path, picture: Path) -> None:
    """Draw the loss of a run over its steps."""
    lines = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "val_loss" in line]
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(
        [line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8, label="training"
    )
    axis.plot(
        [line["step"] for line in validated],
        [line["val_loss"] for line in validated],
        "o-",
        label="validation",
    )
    axis.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
