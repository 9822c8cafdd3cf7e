"""A Hub on loopback: the requests of huggingface_hub 2.4, spoken as its source has them, and faults on demand.

Beside each answer stands the file of the client that reads it. It keeps repositories in memory and knows one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInTokenOfNobodyAtAll0123456789"
LARGE = (".safetensors", ".gguf", ".bin")
Fault = int | str  # a status, or drop | half | slow | lost (done, and the reply is lost)


@dataclass
class Repository:
    """`files`: by name; `commits`: ids, oldest first; `deleted`: names."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    deleted: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """`faults`: asked of each request (method, path), None where it may pass. `seen`: every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.seen: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.faults: Callable[[str, str], Fault | None] = lambda _method, _path: None
        self.makes_private = True
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is expected here."""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def oid(name: str, data: bytes) -> str:
    """sha256 of a large file, git's blob id of a small one: _commit_api.py, CommitOperationAdd._local_oid."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    # --- faults

    def _serve(self, method: str) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        with self.server.lock:
            self.server.seen.append((method, path))
            self.server.bodies.append(body)
            fault = self.server.faults(method, path)
        if isinstance(fault, int):
            busy = "Cannot create repo: another conflicting operation is in progress"  # hf_api.py, create_repo
            told = {"error": busy if fault == 409 else f"stand-in says {fault}"}
            return self._answer(fault, told, {"Retry-After": "0"})
        if fault == "drop":
            return self._hang_up()
        with self.server.lock:
            status, told, head = self._route(method, path, body)
        if fault == "lost":
            return self._hang_up()
        self._answer(status, told, head, str(fault or ""))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, told: Any, head: dict[str, str], fault: str = "") -> None:
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **head}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "half":
            self.wfile.write(data[: len(data) // 2])
            return self._hang_up()
        if fault == "slow":
            for at in range(0, len(data), 64):
                self.wfile.write(data[at : at + 64])
                time.sleep(0.01)
            return
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # --- requests

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if method == "PUT":
            return self._store(path, body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}, {}
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":  # hf_api.py, whoami
            return 200, {"type": "user", "name": "me", "auth": {"type": "access_token"}}, {}
        if path == "/api/repos/create":  # hf_api.py, create_repo
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":  # hf_api.py, _validate_yaml
            return self._validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):  # lfs.py, post_lfs_batch_info
            return self._batch(json.loads(body))
        if path == "/verify":  # lfs.py, lfs_upload
            told = json.loads(body)
            kept = self.server.stored.get(told["oid"])
            return (200, {}, {}) if kept is not None and len(kept) == told["size"] else (404, {}, {})
        if parts[:2] == ["api", "models"]:
            return self._of_repository("/".join(parts[2:4]), parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve":  # file_download.py, hf_hub_download
            return self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        return 404, {"error": "not here"}, {}

    def _store(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """lfs.py, _upload_single_part."""
        name = path.rsplit("/", 1)[-1]
        if hashlib.sha256(body).hexdigest() != name:
            return 400, {"error": "another content"}, {}
        self.server.stored[name] = body
        return 200, {}, {}

    def _create(self, told: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{told['organization'] or 'me'}/{told['name']}"
        if told["organization"] not in (None, "me"):
            return 403, {"error": f"You don't have the rights to create a model under {told['organization']}"}, {}
        if name in self.server.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, {}
        private = told.get("visibility") == "private" and self.server.makes_private  # public unless asked
        self.server.repos[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"}, {}

    def _validate(self, content: str) -> tuple[int, Any, dict[str, str]]:
        import yaml

        try:
            data = yaml.safe_load(content.split("---\n")[1])
            wrong = [] if isinstance(data, dict) else [{"message": "no mapping"}]
        except (yaml.YAMLError, IndexError) as fault:
            wrong = [{"message": str(fault)}]
        return (400 if wrong else 200), {"errors": wrong, "warnings": []}, {}

    def _batch(self, told: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for one in told["objects"]:
            row = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.stored:
                upload = {"href": f"{self.server.url}/lfs/{one['oid']}", "header": {}}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/verify", "header": {}}}
            objects.append(row)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _of_repository(self, name: str, words: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self.server.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if words and words[0] == "preupload":  # _commit_api.py, _fetch_upload_modes
            files = [self._mode(repo, one["path"]) for one in json.loads(body)["files"]]
            return 200, {"files": files}, {}
        if words and words[0] == "commit":  # _commit_api.py, _prepare_commit_payload, _send_commit
            return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if words and words[0] == "tree":  # hf_api.py, list_repo_tree and RepoFile
            return 200, [self._listed(path, data) for path, data in sorted(repo.files.items())], {}
        told = {"_id": "1", "id": name, "modelId": name, "private": repo.private, "sha": repo.commits[-1]}
        return 200, {**told, "tags": [], "siblings": [{"rfilename": path} for path in sorted(repo.files)]}, {}

    def _mode(self, repo: Repository, path: str) -> dict[str, Any]:
        known = repo.files.get(path)
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {
            "path": path,
            "uploadMode": mode,
            "shouldIgnore": False,
            "oid": None if known is None else oid(path, known),
        }

    def _commit(self, name: str, repo: Repository, lines: list[dict[str, Any]]) -> tuple[int, Any, dict[str, str]]:
        new = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    return 400, {"error": "the large file was never uploaded"}, {}
                new[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                if new.pop(value["path"], None) is None:
                    return 404, {"error": "A file with this name doesn't exist"}, {"X-Error-Code": "EntryNotFound"}
                repo.deleted.append(value["path"])
        repo.files = new
        repo.commits.append(hashlib.sha1(f"{repo.commits[-1]}{sorted(new)}".encode()).hexdigest())
        url = f"{self.server.url}/{name}/commit/{repo.commits[-1]}"
        return 200, {"success": True, "commitOid": repo.commits[-1], "commitUrl": url, "hookOutput": ""}, {}

    def _listed(self, path: str, data: bytes) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid(path + ".txt", data)}
        if path.endswith(LARGE):
            row["lfs"] = {"oid": oid(path, data), "size": len(data), "pointerSize": 130}
        return row

    def _resolve(self, name: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repo = self.server.repos.get(name)
        if repo is None or path not in repo.files:
            code = "RepoNotFound" if repo is None else "EntryNotFound"
            return 404, b"", {"X-Error-Code": code}
        data = repo.files[path]
        return 200, data, {"ETag": f'"{oid(path, data)}"', "X-Repo-Commit": repo.commits[-1]}
