"""Sample crystals: `python sample.py --composition Na4Cl4 --num-samples 4 --out samples`."""

import sys

from crystallm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
