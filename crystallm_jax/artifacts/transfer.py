"""One file over HTTP, continued where it broke off, and never more of it than it can have."""

import contextlib
import json
import logging
import re
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import crystallm_jax
from crystallm_jax.artifacts.source import MIRROR, Source, without_password
from crystallm_jax.artifacts.table import Artifact, size_text
from crystallm_jax.errors import DataError

_CHUNK = 1 << 16
_MOST_REDIRECTS = 10
# A server that cannot be reached at all is not worth all tries: it will be the network.
_TRIES_UNHEARD = 2
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_PACKAGE = "crystallm_jax"

logger = logging.getLogger(__name__)


class _BrokenOffError(Exception):
    """A try that failed where the next may do better; `wait` in seconds, where the server said how long."""

    def __init__(self, reason: str, *, wait: float | None = None, heard: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.heard = heard


class _Part(NamedTuple):
    """What a response holds: bytes from `begin` on, of `total` where that is known."""

    begin: int
    total: int | None


class _Session(requests.Session):
    """Follows redirects, but from https to https alone."""

    def __init__(self) -> None:
        super().__init__()
        self.max_redirects = _MOST_REDIRECTS
        # Compressed on the way, neither sizes nor parts would be the file's.
        version = crystallm_jax.__version__
        self.headers.update({"Accept-Encoding": "identity", "User-Agent": f"crystallm-jax/{version}"})

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target is not None and _scheme(resp.url) == "https":
            target_url = urllib.parse.urljoin(resp.url, target)
            if _scheme(target_url) != "https":
                resp.close()
                raise DataError(
                    f"{without_password(resp.url)}: redirects to {without_password(target_url)}, which is not "
                    f"encrypted: refused; set {MIRROR} to another place"
                )
        return target


def _scheme(url: str) -> str:
    return urllib.parse.urlsplit(url).scheme.lower()


def download(artifact: Artifact, source: Source, partial: Path) -> bool:
    """Bring `partial` to the whole file, from the bytes that it has; returns whether it came in pieces.

    Its checksum is the caller's to compare. `partial` is left for the next time where this one fails, and what the
    server called the file's version beside it, in `NAME.partial.json`.

    Raises:
        DataError: the file cannot be had, or is not the one.
        OSError: `partial` cannot be written.
    """
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(_Session())
        bar = stack.enter_context(
            tqdm(total=artifact.size, unit="B", unit_scale=True, desc=artifact.name, disable=None)
        )
        transfer = _Transfer(artifact, source, partial, session=session, bar=bar)
        bar.initial = transfer.size()
        if not bar.disable:
            stack.enter_context(logging_redirect_tqdm([logging.getLogger(_PACKAGE)]))
        return transfer.run()


class _Transfer:
    """The state of one download: a session, a bar and a file that grows."""

    def __init__(
        self, artifact: Artifact, source: Source, partial: Path, *, session: requests.Session, bar: tqdm
    ) -> None:
        self._artifact = artifact
        self._source = source
        self._partial = partial
        self._version = partial.with_name(f"{partial.name}.json")
        self._session = session
        self._bar = bar
        self._url = source.url_of(artifact)
        self._shown = without_password(self._url)
        self._mend = (
            f"try again, set {MIRROR} to the URL of a folder that has it, "
            f"or put it into {partial.parent} by hand"
        )

    def run(self) -> bool:
        """Try until the file is whole; returns whether it came in pieces."""
        failures, heard, most = 0, False, self.size()
        while True:
            try:
                began = self._go_on(self.size())
            except _BrokenOffError as error:
                heard = heard or error.heard
                failures = 1 if self.size() > most else failures + 1
                most = max(most, self.size())
                if failures >= (self._source.tries if heard else min(_TRIES_UNHEARD, self._source.tries)):
                    here = f" ({size_text(self.size())} of it are here)" if self.size() else ""
                    raise DataError(f"{self._shown}: {error}{here}; {self._mend}") from None
                self._pause(error, failures)
            else:
                self._version.unlink(missing_ok=True)
                return began > 0

    def size(self) -> int:
        """The bytes that are there."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _pause(self, error: _BrokenOffError, failures: int) -> None:
        longest = self._source.longest_wait
        wait = self._source.backoff * 2 ** (failures - 1) if error.wait is None else error.wait
        if error.wait is not None and error.wait > longest:
            raise DataError(f"{self._shown}: {error}, and asks us to wait {error.wait:,.0f} s; {self._mend}")
        wait = min(wait, longest)
        logger.warning("%s: %s; trying again in %.0f s", self._artifact.name, error, wait)
        time.sleep(wait)

    def _go_on(self, have: int) -> int:
        """Ask for what is missing and write it; returns how many of the bytes had come before."""
        if have > self._artifact.size + self._artifact.slack:
            have = 0
        with self._ask(have) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable and have:
                return have  # nothing is missing, or the checksum will tell
            part = self._part(response, have)
            self._check_space(part)
            with self._partial.open("ab" if part.begin else "wb") as file:
                size = part.begin
                if not size:
                    self._note_version(response)
                if part.total is not None:
                    self._bar.total = part.total
                self._bar.n = size
                self._bar.refresh()
                for data in _chunks(response):
                    size += len(data)
                    if size > self._artifact.size + self._artifact.slack:
                        file.truncate(0)
                        raise DataError(f"{self._shown}: sends more than {self._what()}; {self._mend}")
                    file.write(data)
                    self._bar.update(len(data))
        least = self._artifact.size - self._artifact.slack if part.total is None else part.total
        if size < least:
            raise _BrokenOffError("the connection broke off")
        return part.begin

    def _what(self) -> str:
        return f"the {size_text(self._artifact.size)} of {self._artifact.name}"

    def _ask(self, have: int) -> requests.Response:
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and (version := self._noted_version()):
            headers["If-Range"] = version
        source = self._source
        try:
            return self._session.get(
                self._url, headers=headers, stream=True, timeout=(source.connect_timeout, source.read_timeout)
            )
        except (requests.exceptions.ConnectTimeout, requests.exceptions.ReadTimeout):
            raise _BrokenOffError("the server does not answer", heard=False) from None
        except (requests.exceptions.SSLError, requests.exceptions.ProxyError) as error:
            raise DataError(
                f"{self._shown}: {_reason(error)}; see to REQUESTS_CA_BUNDLE and the proxy, or put the file into "
                f"{self._partial.parent}"
            ) from None
        except requests.ConnectionError as error:
            heard = any(isinstance(item, urllib3.exceptions.ProtocolError) for item in error.args)
            raise _BrokenOffError(_reason(error), heard=heard) from None
        except requests.TooManyRedirects:
            raise DataError(
                f"{self._shown}: redirects {_MOST_REDIRECTS} times and more; {self._mend}"
            ) from None
        except DataError:
            raise
        # Whatever else requests refuses, a REQUESTS_CA_BUNDLE that is not there, a redirect to what is no URL.
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            raise DataError(f"{self._shown}: {_reason(error)}; {self._mend}") from None

    def _part(self, response: requests.Response, have: int) -> _Part:
        """What the response holds, if it is part of the file.

        Raises:
            _BrokenOffError: it is none, but a later one may be.
            DataError: it is none.
        """
        status = response.status_code
        if status in _PASSING:
            raise _BrokenOffError(f"HTTP {status}", wait=_retry_after(response))
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        part = _Part(0, total)
        if status == requests.codes.partial_content:
            given = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
            )
            if not have or given is None or int(given[1]) != have:
                self._partial.unlink(missing_ok=True)
                raise _BrokenOffError("the server sent another part than was asked for")
            whole = have + total if total is not None else None
            part = _Part(have, whole if given[2] == "*" else int(given[2]))
        elif status != requests.codes.ok:
            reason = {404: ", no such file there", 401: ", not for us", 403: ", not for us"}.get(status, "")
            raise DataError(f"{self._shown}: HTTP {status}{reason}; {self._mend}")
        if part.total is not None and not self._artifact.may_have(part.total):
            raise DataError(f"{self._shown}: has {part.total:,} bytes, not {self._what()}; {self._mend}")
        return part

    def _check_space(self, part: _Part) -> None:
        folder = self._partial.parent
        free = shutil.disk_usage(folder).free + (0 if part.begin else self.size())
        needed = (part.total or self._artifact.size) - part.begin
        if needed > free:
            raise DataError(
                f"{folder}: {size_text(needed)} are needed for {self._artifact.name}, {size_text(free)} are free: make "
                "room, or set CRYSTALLM_CACHE to a folder elsewhere"
            )

    def _note_version(self, response: requests.Response) -> None:
        tag = response.headers.get("ETag", "")
        # A weak tag says that two files mean the same, not that their bytes are.
        version = tag if tag.startswith('"') else response.headers.get("Last-Modified", "")
        self._version.write_text(json.dumps({"url": self._shown, "version": version}), encoding="utf-8")

    def _noted_version(self) -> str | None:
        """What this server called the file that the first bytes came from; another server's word means nothing here."""
        try:
            noted = json.loads(self._version.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # then the checksum will tell
        if not isinstance(noted, dict) or noted.get("url") != self._shown:
            return None
        version = noted.get("version")
        return version if isinstance(version, str) and version.isprintable() else None


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The bytes as they came: requests itself would unpack what a server calls gzip."""
    try:
        yield from response.raw.stream(_CHUNK, decode_content=False)
    except urllib3.exceptions.ReadTimeoutError:
        raise _BrokenOffError("no more came in time") from None
    except urllib3.exceptions.HTTPError:
        raise _BrokenOffError("the connection broke off") from None


def _retry_after(response: requests.Response) -> float | None:
    """The seconds that a server asks to wait; None where it asks for none, or not in words that one knows."""
    text = response.headers.get("Retry-After")
    if text is None:
        return None
    try:
        return urllib3.Retry().parse_retry_after(text)
    except urllib3.exceptions.InvalidHeader:
        return None


def _reason(error: BaseException) -> str:
    """What lies at the bottom of a requests exception, in one line and without the address, which may be signed."""
    chain: list[BaseException] = [error]
    while (deeper := _under(chain[-1])) is not None:
        chain.append(deeper)
    if any(isinstance(item, urllib3.exceptions.NameResolutionError) for item in chain):
        return "its host is not known, or there is no network"
    last = chain[-1]
    text = (isinstance(last, OSError) and last.strerror) or str(last)
    return " ".join(text.split()) or type(last).__name__


def _under(error: BaseException) -> BaseException | None:
    """The exception that another one wraps: urllib3 and requests keep it in three places."""
    places = (getattr(error, "reason", None), error.__cause__, *error.args)
    return next((item for item in places if isinstance(item, BaseException)), None)
