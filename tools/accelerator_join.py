"""What came back from a bare machine as a model folder, which `crystallm sample --model` takes."""

from pathlib import Path

from accelerator_parts import read_parts

from crystallm_jax.models.card import ModelCard
from crystallm_jax.models.model import Model, Training
from crystallm_jax.models.model_folder import write_folder


def join(folder: Path, out: Path) -> ModelCard:
    """Make a model folder of parts, in half precision as they are.

    Args:
        folder: what came back.
        out: the model folder, which must not be there yet.

    Raises:
        ModelError: a part is missing or damaged, or the folder cannot be written.
    """
    weights, report = read_parts(folder)
    stood = report["training"]
    val_loss = stood.get("val_loss")
    training = Training(stood["step"], val_loss, report["settings"])
    card = ModelCard(
        data=f"{report['dataset']}, {stood['epochs']:.2f} times",
        training_command=report["command"],
        metrics={} if val_loss is None else {"val_loss": val_loss},
    )
    return write_folder(out, Model(weights.config, weights.params, training), card=card, dtype="float16")
