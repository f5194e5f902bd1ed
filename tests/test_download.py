"""Published files by name, had from a server on this machine that does what servers and networks do."""

import hashlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests

from crystallm_jax.artifacts import cache_folder, converted_folder, fetch, model_archives
from crystallm_jax.artifacts.fetching import kept
from crystallm_jax.artifacts.source import Source, default_source, without_password
from crystallm_jax.artifacts.table import KINDS, Artifact, find, published
from crystallm_jax.artifacts.transfer import _Session
from crystallm_jax.cli import download as download_verb
from crystallm_jax.cli import main
from crystallm_jax.errors import ConfigError, DataError

Behaviour = Callable[["_Handler", bytes], None]
DATA = np.random.default_rng(0).bytes(300_000)
NAME = "thing.tar.gz"
THING = Artifact(NAME, "model", len(DATA), 1000, hashlib.md5(DATA).hexdigest())
OTHER = bytes(reversed(DATA))


class Server(ThreadingHTTPServer):
    """Serves `files`; of its `script`, each request takes one behaviour, and when there is none left it is sound."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {NAME: DATA}
        self.script: list[Behaviour] = []
        self.asked: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files"

    def source(self, *artifacts: Artifact, **settings: float) -> Source:
        quick = {"connect_timeout": 5.0, "read_timeout": 5.0, "backoff": 0.0, **settings}
        return Source(self.url, artifacts or (THING,), **quick)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is nothing to report

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for headers in self.asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(dict(self.headers))
        data = self.server.files.get(self.path.rpartition("/")[2])
        behaviour = self.server.script.pop(0) if self.server.script else sound
        if data is None and behaviour is sound:
            behaviour = status(404)
        behaviour(self, data or b"")

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()[:8]}"'


def sound(handler: _Handler, data: bytes, *, keep: int | None = None) -> None:
    """Serve a file, or the range that is asked for if it is still the same; `keep` bytes of it, then hang up."""
    begin = int(handler.headers.get("Range", "bytes=0-")[6:].split("-")[0])
    if handler.headers.get("If-Range", _tag(data)) != _tag(data):
        begin = 0
    if begin and begin >= len(data):
        handler.answer(416, Content_Range=f"bytes */{len(data)}")
        return
    body = data[begin:]
    span = {"Content_Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
    cut = {} if keep is None else {"length": len(body)}
    handler.answer(206 if begin else 200, body[:keep], ETag=_tag(data), **cut, **span)


def breaks_off(after: int) -> Behaviour:
    return lambda handler, data: sound(handler, data, keep=after)


def status(code: int, **headers: str) -> Behaviour:
    return lambda handler, data: handler.answer(code, b"<html>sorry</html>", **headers)


def serves(body: bytes) -> Behaviour:
    return lambda handler, data: sound(handler, body)


def without_ranges(handler: _Handler, data: bytes, keep: int | None = None) -> None:
    handler.answer(200, data[:keep], length=len(data))


def unmeasured(body: bytes) -> Behaviour:
    """Without a length, as old servers do: where it ends is where the connection ends."""

    def behaviour(handler: _Handler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return behaviour


def hangs(handler: _Handler, data: bytes) -> None:
    sound(handler, data, keep=100_000)
    handler.wfile.flush()
    time.sleep(0.6)


def hangs_up(handler: _Handler, data: bytes) -> None:
    handler.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy between, and a cache of each test's own."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CRYSTALLM_MIRROR", raising=False)
    monkeypatch.setenv("CRYSTALLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "artifacts"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "crystallm_jax")
    return caplog


def _refused(source: Source, *, name: str = NAME) -> str:
    with pytest.raises(DataError) as caught:
        fetch(name, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The table.


def test_the_table_lists_the_record_by_kind() -> None:
    table = published()
    assert len(table) == len({item.name for item in table}) == len({item.md5 for item in table}) == 93
    assert {item.kind for item in table} == set(KINDS)
    assert all(len(item.md5) == 32 and 0 < item.slack < item.size for item in table)
    assert Counter(item.kind for item in table)["model"] == 11


def test_models_are_found_by_the_names_that_they_are_known_by() -> None:
    assert len(model_archives()) == 11
    assert "crystallm_v1_small" in model_archives()
    assert find("crystallm_v1_small", published()).name == "crystallm_v1_small.tar.gz"
    assert find("starts_v1_val.pkl", published()).stem == "starts_v1_val"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crystalm_v1_smal", "did you mean crystallm_v1_small?"),
        ("mp_20_large", "did you mean crystallm_mp_20_large"),
        ("challenge_set.zip", "did you mean challenge_set_v1.zip?"),
        ("cifs_v1_orig", "cifs_v1_orig.tar.gz and cifs_v1_orig.pkl.gz"),
        ("", "--list"),
        ("../secret", "--list"),
    ],
)
def test_an_unknown_or_ambiguous_name_is_answered_with_those_that_were_meant(name: str, words: str) -> None:
    with pytest.raises(DataError, match="name") as caught:
        find(name, published())
    assert words in str(caught.value)


def test_sizes_are_taken_as_roughly_as_the_record_gives_them() -> None:
    tokens = find("tokens_v1_all", published())
    assert tokens.may_have(231_849_999)
    assert not tokens.may_have(240_000_000)
    assert find("crystallm_v1_large", published()).may_have(2_249_000_000)


# Where files are kept.


def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    assert converted_folder("crystallm_v1_small") == tmp_path / "cache" / "models" / "crystallm_v1_small"
    monkeypatch.delenv("CRYSTALLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "crystallm_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "crystallm_jax"


def test_a_mirror_is_an_http_url_and_its_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_source().url_of(published()[0]) == (
        "https://zenodo.org/records/10642388/files/crystallm_v1_small.tar.gz"
    )
    monkeypatch.setenv("CRYSTALLM_MIRROR", "https://me:secret@mirror.example/crystals/")
    assert default_source().url_of(published()[0]).endswith("/crystals/crystallm_v1_small.tar.gz")
    assert without_password(default_source().url) == "https://mirror.example/crystals/"
    for wrong in ("ftp://a/b", "/data/mirror", "https://", "http://[::1", "https://u:secret@a/?token=secret"):
        monkeypatch.setenv("CRYSTALLM_MIRROR", wrong)
        with pytest.raises(ConfigError, match="CRYSTALLM_MIRROR=") as caught:
            default_source()
        assert "secret" not in str(caught.value)


# Downloading.


def test_a_file_is_downloaded_once(server: Server, folder: Path) -> None:
    path = fetch("thing", server.source())
    assert path == folder / NAME
    assert path.read_bytes() == DATA
    assert fetch(NAME, server.source()) == path
    assert len(server.asked) == 1
    assert [item.name for item in folder.iterdir() if not item.name.startswith(".")] == [NAME]


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(server: Server) -> None:
    # More often than it may fail without a byte more: each time there is progress.
    server.script = [breaks_off(n) for n in (70_000, 1, 90_000, 50_000, 40_000, 40_000)]
    path = fetch(NAME, server.source(tries=2))
    assert path.read_bytes() == DATA
    assert server.ranges()[:3] == [None, "bytes=70000-", "bytes=70001-"]
    assert len(server.asked) == 7
    assert all(headers["If-Range"] == _tag(DATA) for headers in server.asked[1:])
    assert all(headers["Accept-Encoding"] == "identity" for headers in server.asked)


def test_a_download_that_failed_is_continued_by_the_next(server: Server, folder: Path) -> None:
    server.script = [breaks_off(120_000), *[hangs_up] * 4]
    assert "or put it into" in _refused(server.source())
    assert kept(THING).state == "partial"
    assert kept(THING).size == 120_000
    assert not (folder / NAME).exists()
    server.asked.clear()
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert server.ranges() == ["bytes=120000-"]


def test_a_server_that_never_gets_further_is_given_up(server: Server) -> None:
    server.script = [breaks_off(120_000), *[breaks_off(0)] * 9]
    assert "the connection broke off (120.0 kB of it are here)" in _refused(server.source(tries=3))
    assert len(server.asked) == 3


def test_one_that_cannot_continue_and_breaks_off_each_time_is_given_up(server: Server) -> None:
    server.script = [lambda *ask, keep=keep: without_ranges(*ask, keep) for keep in (90_000, 50_000) * 9]
    assert "broke off" in _refused(server.source(tries=4))
    assert len(server.asked) == 4


def test_a_server_that_ignores_ranges_begins_anew(server: Server) -> None:
    server.script = [breaks_off(70_000), without_ranges]
    assert fetch(NAME, server.source()).read_bytes() == DATA


def test_a_file_that_changed_meanwhile_begins_anew(server: Server) -> None:
    server.files[NAME] = OTHER
    server.script = [breaks_off(70_000), *[hangs_up] * 4]
    _refused(server.source())
    server.files[NAME] = DATA
    server.asked.clear()
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert [headers["If-Range"] for headers in server.asked] == [_tag(OTHER)]


def test_pieces_that_do_not_fit_together_are_downloaded_anew_once(
    server: Server, folder: Path, said: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    (folder / f"{NAME}.partial").write_bytes(OTHER[:50_000])
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert server.ranges() == ["bytes=50000-", None]
    # Nothing is known of where those bytes came from.
    assert "If-Range" not in server.asked[0]
    assert "do not fit together" in said.text


def test_what_comes_in_pieces_and_never_fits_is_given_up(server: Server, folder: Path) -> None:
    server.files[NAME] = OTHER
    folder.mkdir(parents=True)
    (folder / f"{NAME}.partial").write_bytes(OTHER[:50_000])
    server.script = [sound, breaks_off(70_000), sound]
    with pytest.raises(DataError, match="damaged on its way, or another file"):
        fetch(NAME, server.source())
    assert server.ranges() == ["bytes=50000-", None, "bytes=70000-"]
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("rest", [DATA, DATA + b"more", OTHER], ids=["whole", "longer", "other"])
def test_what_is_left_over_from_before_does_no_harm(server: Server, folder: Path, rest: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / f"{NAME}.partial").write_bytes(rest)
    (folder / f"{NAME}.partial.json").write_text("{not json")
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert not list(folder.glob("*.partial*"))


def test_a_part_that_was_not_asked_for_is_not_written(server: Server) -> None:
    def shifted(handler: _Handler, data: bytes) -> None:
        handler.answer(206, data[60_000:], Content_Range=f"bytes 60000-{len(data) - 1}/{len(data)}")

    server.script = [breaks_off(70_000), shifted]
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert server.ranges() == [None, "bytes=70000-", None]


def test_a_corrupted_file_is_refused_and_not_kept(server: Server, folder: Path) -> None:
    bad = bytes([DATA[0] ^ 1]) + DATA[1:]
    server.script = [serves(bad)]
    message = _refused(server.source())
    assert hashlib.md5(bad).hexdigest() in message
    assert THING.md5 in message
    assert kept(THING).state == "none"
    assert fetch(NAME, server.source()).read_bytes() == DATA


def test_bytes_that_a_server_calls_gzip_stay_as_they_are(server: Server) -> None:
    server.script = [lambda handler, data: handler.answer(200, data, Content_Encoding="gzip")]
    assert fetch(NAME, server.source()).read_bytes() == DATA


def test_a_file_without_a_length_is_taken_when_it_is_whole(server: Server) -> None:
    server.script = [unmeasured(DATA[:100_000]), unmeasured(DATA)]
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert len(server.asked) == 2


def test_a_file_of_another_size_is_refused_before_it_comes(server: Server, folder: Path) -> None:
    server.script = [status(200)]
    assert "has 18 bytes, not the 300.0 kB of thing.tar.gz" in _refused(server.source())
    server.script = [lambda handler, data: handler.answer(200, b"", length=10**12)]
    assert "has 1,000,000,000,000 bytes" in _refused(server.source())
    assert kept(THING).size == 0


def test_what_grows_beyond_the_file_is_stopped(server: Server, folder: Path) -> None:
    server.script = [unmeasured(DATA + bytes(2_000_000))]
    assert "sends more than the 300.0 kB" in _refused(server.source())
    assert kept(THING).size == 0


def test_redirects_are_followed(server: Server) -> None:
    server.script = [breaks_off(70_000), status(302, Location="/elsewhere/thing.tar.gz")]
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert server.ranges() == [None, "bytes=70000-", "bytes=70000-"]


def test_redirects_without_end_or_to_nowhere_are_one_line(server: Server) -> None:
    server.script = [status(301, Location=f"/files/{NAME}")] * 11
    assert "redirects 10 times and more" in _refused(server.source())
    for nowhere in ("//[", "ftp://elsewhere.example/thing"):
        server.script = [status(302, Location=nowhere)]
        assert _refused(server.source()).startswith(f"{server.url}/{NAME}: ")


@pytest.mark.parametrize(
    "target", ["http://elsewhere.example/thing", "HTTP://elsewhere.example", "file:///x"]
)
def test_a_redirect_from_https_to_what_is_not_is_refused(target: str) -> None:
    response = requests.Response()
    response.status_code, response.url = 302, "https://user:secret@here.example/thing?signature=secret"
    response.raw = io.BytesIO()
    response.headers["Location"] = target
    with _Session() as session, pytest.raises(DataError, match=r"https://here\.example/thing") as caught:
        session.get_redirect_target(response)
    assert "secret" not in str(caught.value)
    response.headers["Location"] = "/other"
    with _Session() as session:
        assert session.get_redirect_target(response) == "/other"


def test_a_busy_server_is_asked_again(server: Server, said: pytest.LogCaptureFixture) -> None:
    server.script = [status(503, Retry_After="0"), status(429), status(500), status(503, Retry_After="soon")]
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert "HTTP 503; trying again in 0 s" in said.text


def test_a_server_that_is_busy_for_long_is_given_up(server: Server) -> None:
    server.script = [status(429, Retry_After="3600")]
    assert "HTTP 429, and asks us to wait 3,600 s" in _refused(server.source())
    server.script = [status(503)] * 9
    assert "HTTP 503; try again" in _refused(server.source(tries=3))
    assert len(server.asked) == 4


@pytest.mark.parametrize("code", [404, 403, 418])
def test_a_file_that_is_not_there_is_one_line(server: Server, code: int) -> None:
    server.script = [status(code)]
    message = _refused(server.source())
    assert message.startswith(f"{server.url}/{NAME}: HTTP {code}")
    assert "CRYSTALLM_MIRROR" in message


def test_a_server_that_hangs_is_asked_again(server: Server) -> None:
    server.script = [hangs]
    assert fetch(NAME, server.source(read_timeout=0.3)).read_bytes() == DATA
    assert server.asked[1]["Range"].startswith("bytes=")


def test_no_server_is_one_line(server: Server) -> None:
    closed = Source("http://127.0.0.1:1/files", (THING,), backoff=0)
    message = _refused(closed)
    assert message.startswith(
        "http://127.0.0.1:1/files/thing.tar.gz: Connection refused; try again, set CRYSTALLM_"
    )


def test_broken_certificates_and_proxies_are_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # An http server speaks no TLS.
    https = Source(server.url.replace("http", "https"), (THING,), backoff=0)
    assert "REQUESTS_CA_BUNDLE" in _refused(https)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "none.pem" in _refused(https)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert "see to REQUESTS_CA_BUNDLE and the proxy" in _refused(server.source())


def test_too_little_room_is_said_before_anything_is_written(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert "300.0 kB are needed for thing.tar.gz, 1.0 kB are free" in _refused(server.source())
    assert kept(THING).size == 0


def test_a_cache_that_cannot_be_made_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "set CRYSTALLM_CACHE to a folder that can be used" in _refused(server.source())


# What is in the cache.


def test_a_file_put_there_by_hand_is_taken(server: Server, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(DATA)
    assert kept(THING).state == "unchecked"
    assert fetch(NAME, server.source()) == folder / NAME
    assert kept(THING).state == "checked"
    assert server.asked == []


def test_a_damaged_file_in_the_cache_is_replaced_and_said(
    server: Server, folder: Path, said: pytest.LogCaptureFixture
) -> None:
    path = fetch(NAME, server.source())
    path.write_bytes(OTHER)
    assert kept(THING).state == "unchecked"
    assert fetch(NAME, server.source()).read_bytes() == DATA
    assert "is not the published file" in said.text


def test_a_checked_file_is_not_read_again(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(NAME, server.source())
    monkeypatch.setattr("crystallm_jax.artifacts.fetching.digest_of", lambda *_: pytest.fail("it was read"))
    assert fetch(NAME, server.source()) == path


def test_two_at_once_download_once(server: Server, said: pytest.LogCaptureFixture) -> None:
    both = threading.Barrier(2)

    def slow(handler: _Handler, data: bytes) -> None:
        time.sleep(0.2)
        sound(handler, data)

    def one(_: int) -> bytes:
        both.wait()
        return fetch(NAME, server.source()).read_bytes()

    server.script = [slow]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(2))) == [DATA, DATA]
    assert len(server.asked) == 1


# The verb.


@pytest.fixture
def verb(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The command line's table holds a thing, that is no archive though it is called one, a list and an archive."""
    for name in ("notes.txt", "more.txt"):
        (tmp_path / name).write_text(name)
    with tarfile.open(tmp_path / "pair.tar.gz", "w:gz") as archive:
        for name in ("notes.txt", "more.txt"):
            archive.add(tmp_path / name, f"pair/{name}")
    server.files |= {"pair.tar.gz": (tmp_path / "pair.tar.gz").read_bytes(), "list.pkl": b"pickle"}
    table = [THING, *(_artifact(name, server.files[name]) for name in ("pair.tar.gz", "list.pkl"))]
    monkeypatch.setattr(download_verb, "default_source", lambda: server.source(*table))
    logger = logging.getLogger("crystallm_jax")
    before = logger.handlers, logger.level, logger.propagate
    yield server
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def _artifact(name: str, data: bytes) -> Artifact:
    return Artifact(name, "tokens", len(data), 0, hashlib.md5(data).hexdigest())


def test_the_verb_prints_where_files_lie(
    verb: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "thing", "list", "thing"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(folder / NAME), str(folder / "list.pkl")]
    assert err.count("CC BY 4.0") == 1
    assert "10642388" in err


def test_the_verb_puts_files_where_they_are_wanted(
    verb: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tmp_path / "mine"
    assert main(["download", "thing", "--out", str(wanted)]) == 0
    assert main(["download", "thing", "--out", str(wanted)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(wanted / NAME)] * 2
    assert [item.name for item in wanted.iterdir()] == [NAME]
    (wanted / "list.pkl").write_text("mine")
    assert main(["download", "list", "--out", str(wanted)]) == 1
    assert "is there already and is another file" in capsys.readouterr().err
    assert (wanted / "list.pkl").read_text() == "mine"


def test_the_verb_copies_where_it_cannot_link(
    verb: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert main(["download", "thing", "--out", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / NAME).read_bytes() == DATA


def test_the_verb_unpacks(
    verb: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["download", "pair", "--unpack"]) == 0
    assert capsys.readouterr().out == "pair\n"
    assert sorted(item.name for item in Path("pair").iterdir()) == ["more.txt", "notes.txt"]
    assert main(["download", "pair", "--unpack"]) == 1
    assert "pair: is there already" in capsys.readouterr().err
    assert main(["download", "pair", "list", "--unpack", "--out", "there"]) == 1
    assert "list.pkl: is no archive" in capsys.readouterr().err
    assert main(["download", "thing", "--unpack"]) == 1
    assert "thing.tar.gz cannot be read" in capsys.readouterr().err
    assert sorted(item.name for item in Path().iterdir()) == ["pair"]


def test_the_verb_lists_what_there_is_and_what_is_here(
    verb: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch("list", download_verb.default_source())
    (folder / f"{NAME}.partial").write_bytes(DATA[:100_000])
    (folder / "pair.tar.gz").write_bytes(b"by hand")
    capsys.readouterr()
    assert main(["download", "--list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "in the cache" in rows["list.pkl"]
    assert "33 % of it in the cache" in rows[NAME]
    assert "not checked yet" in rows["pair.tar.gz"]
    assert main(["download", "--list", "--json"]) == 0
    told = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (told["list"]["cache"], told["list"]["path"]) == ("checked", str(folder / "list.pkl"))
    assert (told["thing"]["cache"], told["thing"]["path"]) == ("partial", None)
    assert told["thing"]["md5"] == THING.md5


@pytest.mark.parametrize("flags", [[], ["--json", "thing"], ["--list", "thing"], ["--list", "--unpack"]])
def test_flags_that_do_not_go_together_are_wrong_usage(
    verb: Server, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_name_fails_before_anything_is_downloaded(
    verb: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "thing", "thingy"]) == 1
    assert "did you mean thing?" in capsys.readouterr().err
    assert verb.asked == []


def test_ctrl_c_leaves_what_has_come(server: Server, tmp_path: Path) -> None:
    artifact = find("challenge_set_v1", published())
    server.files[artifact.name] = bytes(artifact.size)
    reached, left = threading.Event(), threading.Event()

    def stalls(handler: _Handler, data: bytes) -> None:
        sound(handler, data, keep=200_000)
        handler.wfile.flush()
        reached.set()
        left.wait(60)

    server.script = [stalls]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"CRYSTALLM_MIRROR": server.url, "CRYSTALLM_CACHE": str(tmp_path)}
    # Where the tests run as a background job, SIGINT is ignored from the start.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from crystallm_jax.cli import main; sys.exit(main(['download', 'challenge_set_v1']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert reached.wait(60)
        partial = tmp_path / "artifacts" / f"{artifact.name}.partial"
        _until(lambda: partial.exists() and partial.stat().st_size > 100_000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    left.set()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert 100_000 < partial.stat().st_size <= 200_000


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.02)
    pytest.fail("it never came to hold")


def test_neither_help_nor_a_cached_file_need_the_network_library(tmp_path: Path) -> None:
    code = (
        "import sys, crystallm_jax.artifacts, crystallm_jax.cli.download\n"
        "assert not {'requests', 'jax'} & set(sys.modules)"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
