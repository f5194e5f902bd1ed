"""Train a model: `python train.py --config configs/small.yaml dataset=DIR out_dir=DIR`."""

import sys

from crystallm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
