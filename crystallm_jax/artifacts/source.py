"""Where the published files are had from, and how patiently."""

import os
import urllib.parse
from dataclasses import dataclass

from crystallm_jax.artifacts.table import RECORD, Artifact, published
from crystallm_jax.errors import ConfigError

MIRROR = "CRYSTALLM_MIRROR"


@dataclass(frozen=True)
class Source:
    """A folder on the web that holds the files under their names.

    Attributes:
        url: of the folder, http or https.
        artifacts: the files that it may hold.
        connect_timeout: seconds to reach the server.
        read_timeout: seconds to wait for the next bytes.
        tries: how often in a row it may fail without a byte more.
        backoff: seconds before the second try; they double from one to the next, up to `longest_wait`.
        longest_wait: seconds between two tries at most; a server that asks for more is given up.
    """

    url: str
    artifacts: tuple[Artifact, ...]
    connect_timeout: float = 15.0
    read_timeout: float = 60.0
    tries: int = 5
    backoff: float = 1.0
    longest_wait: float = 120.0

    def url_of(self, artifact: Artifact) -> str:
        """Where one file is."""
        return f"{self.url.rstrip('/')}/{urllib.parse.quote(artifact.name)}"


def default_source() -> Source:
    """The published record, or the mirror that `$CRYSTALLM_MIRROR` names.

    Raises:
        ConfigError: the variable holds no http or https URL.
    """
    url = os.environ.get(MIRROR, "").strip() or f"{RECORD}/files"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = (
            parts.scheme in {"http", "https"} and parts.hostname and not parts.query and not parts.fragment
        )
    except ValueError:  # a broken IPv6 address, for instance
        usable = False
    if not usable:
        raise ConfigError(
            f"{MIRROR}={without_password(url)}: not the http(s) URL of a folder; for files that are on this machine, "
            "put them into the cache folder that `crystallm download --list` names"
        )
    return Source(url, published())


def without_password(url: str) -> str:
    """A URL as it may be shown: without what stands before its host, and without a query, which may be signed."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
