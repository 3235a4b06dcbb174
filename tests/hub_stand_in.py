"""A hub on this machine: what the Hugging Face hub's own client needs to upload and fetch files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api

from leap_pl.inputs.hub import check_reachable

TOKEN = "hf_of_alice"
COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Repositories in memory, of the user alice, whose token may write.

    Attributes:
        files: Repository → name → content.
        private: Repositories that are private.
        gated: Repositories whose owner must grant access.
        requests: Method and path of each request, without the query.
        failing: Status that answers every commit; 0: it succeeds.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.failing = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close_at_once(self) -> None:
        """Refuse connections from now on, those that a client has kept open too."""
        self.shutdown()
        self.server_close()
        huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._note()
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            files = self.server.files[found[1]]
            self._json([{"type": "file", "path": name, "oid": _oid(of), "size": len(of)} for name, of in files.items()])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
                self._refuse(401, message="Invalid username or password.")
            elif found[1] in self.server.files:
                self._json({"id": found[1], "private": found[1] in self.server.private})
            else:
                self._refuse(404, "RepoNotFound")
        else:
            self._refuse(404)

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, message="Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files, "commitOid": COMMIT})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404)

    def _create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "alice":
            self._refuse(403, message="You have no right to create a model under this namespace.")
            return
        exists = name in self.server.files
        if not exists:
            self.server.files[name] = {}
            if asked.get("visibility", asked.get("private")) in ("private", True):  # newer clients, older ones
                self.server.private.add(name)
        self._json({"url": f"{self.server.address}/{name}"}, 409 if exists else 200)

    def _commit(self, name: str, lines: list[dict[str, dict[str, str]]]) -> None:
        if self.server.failing:
            self._refuse(self.server.failing, message="The quota is used up.")
            return
        files = self.server.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def _file(self, name: str, revision: str, file: str) -> None:
        files = self.server.files.get(name)
        if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif files is None or (name in self.server.private and "Authorization" not in self.headers):
            self._refuse(401, "RepoNotFound")
        elif name in self.server.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif file not in files:
            self._refuse(404, "EntryNotFound")
        else:
            self._answer(200, files[file], {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": COMMIT})

    def _note(self) -> str:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        return path

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    """The name that git gives a content."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that the client talks to, as alice, with an empty local cache."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.address)  # objects that keep the address of their first use
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    check_reachable.cache_clear()
    huggingface_hub.close_session()  # one that was opened with a proxy
    yield server
    server.close_at_once()
