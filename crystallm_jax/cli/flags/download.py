"""Flags of `crystallm download`."""

import argparse
from pathlib import Path

_EXAMPLE = """\
examples:
  crystallm download --list
  crystallm download crystallm_v1_small
  crystallm download prompts_mp_20_test challenge_set_v1 --unpack --out data
  crystallm download cifs_v1_test.pkl.gz --out data
  crystallm download --list --json | jq -r '.[] | select(.kind == "model") | .name'

environment:
  CRYSTALLM_MIRROR  the URL of a folder that holds the files, to have them from there
  CRYSTALLM_CACHE   where files are kept (default: crystallm_jax in the user's cache folder)
Proxies and certificates: HTTPS_PROXY, NO_PROXY and REQUESTS_CA_BUNDLE.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the verb and its flags."""
    parser = subparsers.add_parser(
        "download",
        help="the published models and data by name",
        description="Download published files, check them and keep them; prints where each lies.\n"
        "A download that was broken off goes on where it was.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a file, with or without its ending")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="put the files, or what is unpacked, there (default: leave files in the cache; unpack into the current "
        "folder)",
    )
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="unpack archives into DIR/NAME (default: leave them as they are)",
    )
    parser.add_argument(
        "--list", action="store_true", help="show all files, and which are in the cache (default: download)"
    )
    parser.add_argument("--json", action="store_true", help="with --list: as a JSON array (default: as text)")
    return parser
