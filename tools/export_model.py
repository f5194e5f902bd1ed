"""Writes the newest checkpoint of a run as a model folder: half-precision weights, configuration, model card.

python tools/export_model.py runs/default crystallm_jax/assets/default --data "the Materials Project subset ..."
"""

import argparse
import json
import sys
from pathlib import Path

from crystallm_jax.config import load_config
from crystallm_jax.convert.folder import write_folder
from crystallm_jax.model import count_params
from crystallm_jax.training.config import TrainConfig
from crystallm_jax.training.load import load_weights
from crystallm_jax.training.metrics import METRICS_FILE
from crystallm_jax.training.runfolder import CONFIG_FILE


def main() -> int:
    """Export one run."""
    parser = argparse.ArgumentParser(description="Write a run's newest checkpoint as a model folder.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--data", required=True, help="what it was trained on, its licence and credits")
    parser.add_argument("--notes", default="", help="measured quality, limits")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float16", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    weights = load_weights(arguments.run)
    write_folder(
        arguments.out, weights.config, weights.params, card=card(arguments, weights), dtype=arguments.dtype
    )
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.2f} MB")
    return 0


def card(arguments: argparse.Namespace, weights: object) -> str:
    """The model card."""
    config = load_config(TrainConfig, arguments.run / CONFIG_FILE)
    lines = [json.loads(line) for line in (arguments.run / METRICS_FILE).read_text().splitlines()]
    validated = [line for line in lines if "val_loss" in line]
    val_loss = f"{validated[-1]['val_loss']:.4f}" if validated else "not measured"
    return f"""# Model card

- Parameters: {count_params(weights.params):,}; {weights.config.n_layer} layers, {
        weights.config.n_head
    } heads, width {weights.config.n_embd}, context {
        weights.config.block_size
    } tokens; the published vocabulary of {weights.config.vocab_size} tokens.
- Data: {arguments.data}
- Training: {lines[-1]["step"]:,} steps of {config.tokens_per_step:,} tokens, AdamW, peak learning rate {
        config.learning_rate:g}, dropout {config.dropout:g}; its configuration is in the run folder.
- Validation loss: {val_loss} nats a token.
- Weights: {arguments.dtype}.
{arguments.notes}
"""


if __name__ == "__main__":
    sys.exit(main())
