"""`python -m crystallm_jax VERB`."""

import sys

from crystallm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
