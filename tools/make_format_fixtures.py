"""Writes the model of `tests/fixtures/models` in every format of today, once a format's number.

python tools/make_format_fixtures.py

What is there is left alone: the fixtures of earlier formats are what shows that they still load. Run it after the
number of a format was raised.
"""

import sys
from dataclasses import replace
from pathlib import Path

from crystallm_jax.models import huggingface, npz
from crystallm_jax.models.card import FOLDER_FORMAT, ModelCard
from crystallm_jax.models.kinds import WriteSettings, write_model
from crystallm_jax.models.model_folder import read_folder_training

MODELS = Path(__file__).parents[1] / "tests" / "fixtures" / "models"
CARD = ModelCard(license="cc0-1.0", data="none to speak of", metrics={"val_loss": 5.0})


def main() -> int:
    """Write what is missing."""
    # The newest folder holds the model with its moments; the first was made from the first run of all.
    newest = max(MODELS.glob("folder_*"), key=lambda path: int(path.name.removeprefix("folder_")))
    weights = read_folder_training(newest)
    light = replace(weights, training=None)
    for name, form, given in (
        (f"folder_{FOLDER_FORMAT}", "folder", weights),
        (f"hub_{huggingface.FORMAT}", "huggingface", light),
        (f"numpy_{npz.FORMAT}.npz", "numpy", light),
    ):
        if (MODELS / name).exists():
            print(f"{name}: is there already")
            continue
        write_model(MODELS / name, given, kind=form, settings=WriteSettings(CARD))
        print(f"{name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
