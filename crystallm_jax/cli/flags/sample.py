"""Flags of `crystallm sample`."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from crystallm_jax.cli.flags.devices import add_device_flags
from crystallm_jax.cli.flags.prompts import PROMPT_HELP, add_prompt_flags, positive

_EXAMPLE = f"""examples:
  crystallm sample --composition Na4Cl4 --num-samples 8 --out samples
  crystallm sample --formula TiO2 --z 2,4 --spacegroup P4_2/mnm --out rutile
  crystallm sample --formula NaCl --z 1,4 --spacegroup compatible --num-samples 4 --out salt
  crystallm sample --elements Li-Fe-P-O --z 1,2,4 --max-sites 60 --out system
  crystallm sample --composition Ti4O8 --target-valid 10 --constrain symmetry --out titania
  crystallm sample --model runs/mine --prompts compositions.csv --out screened

{PROMPT_HELP}"""


def add_parser(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "sample",
        help="generate, post-process and validate crystals",
        description="Generate crystals with a model.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="default",
        help="a run folder, a model folder, a published ckpt.pt, or `default`, the one in the package (default)",
    )
    add_prompt_flags(parser)
    add = parser.add_argument
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write: cifs/, symmetrized/, samples.csv, structures.extxyz, run.json",
    )
    _add_numbers(add)
    _add_method(add)
    _add_machine(add)
    add_device_flags(add)


def _add_numbers(add: Callable[..., Any]) -> None:
    """Add the flags that say how many samples are wanted."""
    add("--num-samples", type=positive, metavar="N", help="samples a prompt (default: 1)")
    add(
        "--target-valid",
        type=positive,
        metavar="K",
        help="instead of --num-samples: go on with each prompt until K samples are valid",
    )
    add(
        "--limit-samples",
        type=positive,
        metavar="N",
        help="with --target-valid: samples a prompt at most (default: 50 K)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with what a run with these settings left in --out, if any; after SIGTERM the exit code is 75, on"
        " which a scheduler can run the command again",
    )


def _add_method(add: Callable[..., Any]) -> None:
    """Add the flags that say what is drawn, each with its default."""
    add("--temperature", type=_temperature, default=1.0, metavar="T", help="default: %(default)s")
    add(
        "--top-k",
        type=_natural,
        default=10,
        metavar="K",
        help="1 is greedy, 0 draws from all (default: %(default)s)",
    )
    add(
        "--top-p",
        type=_share,
        metavar="P",
        help="of these, draw from the fewest whose probabilities add up to P (default: from all)",
    )
    add(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="most tokens to add (default: to the context's end)",
    )
    add("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    add(
        "--constrain",
        choices=("syntax", "composition", "symmetry", "positions"),
        help="hold every sample to the dialect's syntax, to the prompt's composition too, to multiplicities that"
        " the space group has as well, or also to places and distances of its atoms (default: to nothing, as"
        " published)",
    )
    add(
        "--overflow",
        choices=("stop", "slide"),
        default="stop",
        help="at the context's end: stop, or slide as published, slowly (default: %(default)s)",
    )


def _add_machine(add: Callable[..., Any]) -> None:
    """Add the flags that say how the machine is used."""
    add(
        "--batch-size",
        type=positive,
        metavar="B",
        help="rows decoded together; it changes no sample (default: 64 on a CPU, 512 elsewhere)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic (default: %(default)s)",
    )
    add(
        "--cache-dtype",
        choices=("float32", "bfloat16"),
        help="of the keys and values kept (default: as --dtype)",
    )
    add("--workers", type=positive, metavar="N", help="validating processes (default: one a usable core)")
    add(
        "--time-limit",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds to validate one (default: %(default)s)",
    )


def _natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 4294967295")
    return int(text)


def _temperature(text: str) -> float:
    return _number(text, "a number above 0; for the most likely token use --top-k 1")


def _seconds(text: str) -> float:
    return _number(text, "a number of seconds above 0")


def _share(text: str) -> float:
    value = _number(text, "a share above 0 and at most 1")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share above 0 and at most 1")
    return value


def _number(text: str, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value
