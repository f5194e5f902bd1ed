"""The hub: a small one of our own takes a model and gives it back; what cannot be done is said in one line."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from crystallm_jax.errors import ModelError
from crystallm_jax.models import hub

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub's interface as pushing and fetching use."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), Content_Type="application/json")

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", status=status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if "somebody/salts" not in path:
            gated = "gated" in path
            self._refuse(403 if gated else 404, "GatedRepo" if gated else "RepoNotFound")
        elif "/revision/absent" in path:
            self._refuse(404, "RevisionNotFound")
        elif "/tree/" in path:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.server.files.items()
                ]
            )
        elif path.startswith("/api/"):
            self._json({"id": "somebody/salts", "sha": COMMIT, "private": True, "siblings": []})
        elif (name := path.partition(f"/resolve/{COMMIT}/")[2]) in self.server.files:
            data = self.server.files[name]
            self._send(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
        else:
            self._refuse(404, "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._json({"url": f"{self.server.url}/somebody/salts"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json(
                {"commitUrl": f"{self.server.url}/somebody/salts/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self._refuse(404, "NotHere")


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _run(program: str, home: Path, **environment: str) -> list[str]:
    """The lines that a fresh interpreter prints: the hub's library reads its environment once."""
    clean = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "SYSTEMROOT") if key in os.environ}
    clean |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


HEAD = """
import sys
from pathlib import Path
from crystallm_jax.models.hub import fetch_hub, push_hub
from crystallm_jax.errors import ModelError
def told(work, *args, **settings):
    try:
        print("done", work(*args, **settings))
    except ModelError as error:
        print("refused", error)
"""


def test_what_is_pushed_is_fetched_again_and_found_offline(server: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "checkpoint-1").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        (model / name).write_text(f"content of {name}")
    for name in ("secret.env", "modeling.py", "training_args.bin", "checkpoint-1/model.safetensors"):
        (model / name).write_text("to be left at home")
    program = f"""{HEAD}
told(push_hub, Path({str(model)!r}), "somebody/salts", private=True)
told(fetch_hub, "somebody/salts")
for name in ("somebody/none", "somebody/gated", "somebody/salts@absent", "salts", "../a/b"):
    told(fetch_hub, name)
"""
    home = tmp_path / "home"
    pushed, fetched, *refused = _run(program, home, HF_ENDPOINT=server.url, HF_TOKEN="hf_of_a_test")
    assert pushed == f"done {server.url}/somebody/salts"
    assert server.made[0]["name"] == "salts"
    assert server.made[0].get("private") or server.made[0].get("visibility") == "private"
    assert sorted(server.files) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    folder = Path(fetched.removeprefix("done "))
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        name: f"content of {name}" for name in server.files
    }
    assert [line.split(": ", 1)[0] for line in refused] == [
        "refused hf:somebody/none",
        "refused hf:somebody/gated",
        "refused hf:somebody/salts@absent",
        "refused 'salts' is no name of a model on the hub",
        "refused '../a/b' is no name of a model on the hub",
    ]
    assert "access must be granted" in refused[1]
    assert "no such revision" in refused[2]
    # Without a network, and with the network forbidden.
    server.asked.clear()
    again = f"""{HEAD}
told(fetch_hub, "somebody/salts")
told(fetch_hub, "somebody/other")
told(push_hub, Path({str(model)!r}), "somebody/salts")
"""
    found, other, push = _run(again, home, HF_HUB_OFFLINE="1")
    assert found == fetched
    assert "HF_HUB_OFFLINE is set, and the model is not in the cache" in other
    assert "no token to push with: run `hf auth login`, or set HF_TOKEN" in push
    assert server.asked == []
    unreachable = f"{HEAD}told(fetch_hub, 'somebody/salts')\ntold(fetch_hub, 'somebody/other')"
    found, other = _run(unreachable, home, HF_ENDPOINT="http://127.0.0.1:1")
    assert found == fetched
    assert "the hub cannot be reached, and the model is not in the cache" in other


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder, as far as the hub looks into it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"numbers")
    return tmp_path / "model"


def _refused(call: Any, *args: Any, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for message in (_refused(hub.fetch_hub, "a/b"), _refused(hub.push_hub, folder, "a/b")):
        assert "pip install 'crystallm-jax[hub]'" in message


class _Repository:
    """Stands for `HfApi`, of a repository that is there already."""

    private = False

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def create_repo(self, name: str, **_: Any) -> str:
        return f"there/{name}"

    def repo_info(self, _: str) -> "_Repository":
        return self

    def upload_folder(self, **settings: Any) -> None:
        self.sent.append(settings)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> _Repository:
    repository = _Repository()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: repository)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "of a test")
    return repository


def test_what_shall_be_private_is_not_pushed_where_all_see_it(repository: _Repository, folder: Path) -> None:
    assert "is there already and public" in _refused(hub.push_hub, folder, "a/b", private=True)
    assert repository.sent == []
    assert hub.push_hub(folder, "a/b", private=False) == "there/a/b"
    assert len(repository.sent) == 1


def test_what_is_no_model_or_no_place_is_not_pushed(
    repository: _Repository, tmp_path: Path, folder: Path
) -> None:
    assert "no model folder to push" in _refused(hub.push_hub, tmp_path, "a/b")
    assert "leave @v1 out" in _refused(hub.push_hub, folder, "a/b@v1")
    assert "is no name" in _refused(hub.push_hub, folder, "a/b/c")
    assert repository.sent == []


def test_pickled_weights_are_fetched_where_there_are_no_others_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repository, revision, "pytorch_model.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").touch()
    hub.fetch_hub("a/b@v1")
    assert asked == [("a/b", "v1", False), ("a/b", "v1", True)]
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    hub.fetch_hub("a/b")
    assert asked[2:] == [("a/b", None, False)]
    assert not any(pattern in {"*", "*.py", "*.bin"} for pattern in hub.MODEL_FILES)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError("no route\nto host"), "no route to host"),
        (OSError(28, "No space left on device"), "No space left"),
        (errors.LocalEntryNotFoundError("long"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_breaks_on_the_way_is_told_in_one_line(
    raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    message = _refused(hub.fetch_hub, "a/b")
    assert message.startswith("hf:a/b: ")
    assert said in message


def test_an_empty_repository_holds_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "none"))
    assert "there is no model in it" in _refused(hub.fetch_hub, "a/b")
