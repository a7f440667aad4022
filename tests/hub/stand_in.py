"""A stand-in for the hub: model repositories over real HTTP on loopback, as huggingface_hub's client speaks to them.

Repositories, branches with their commits, large files by their sha256 (LFS batch, upload, verification), what is
refused as the hub refuses it, and faults on demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_standinstandinstandinstandin"


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)  # commits: id and files

    def head(self, branch: str) -> tuple[str, dict[str, bytes]]:
        return self.branches[branch][-1]

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        commits = self.branches[branch]
        before = commits[-1]
        name = hashlib.sha1(f"{before[0]}{message}{len(commits)}".encode()).hexdigest()
        commits.append((name, {**before[1], **files}))
        return name


class StandInHub:
    """`received`: all bytes that ever came, whatever became of them. `fault`: called with method and path before an
    answer; a status, or "cut" for a connection that breaks, or None."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.fault: Callable[[str, str], int | str | None] = lambda _method, _path: None
        hub = self

        class Handler(_Handler):
            standin = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> StandInHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def make(self, name: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[name] = repo = Repo(private)
        repo.branches["main"] = [(hashlib.sha1(name.encode()).hexdigest(), files or {})]
        return repo

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[name].head(branch)[1]

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    standin: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        hub, path = self.standin, unquote(self.path.partition("?")[0])
        hub.requests.append((method, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.received.append(body)
        fault = hub.fault(method, path)
        if fault == "cut":
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int):
            self._send(fault, {"error": "on demand"})
        elif not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
        else:
            self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        hub, parts = self.standin, path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.make(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
            return self._send(200, {"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":
            if method == "PUT":
                hub.large[parts[1]] = body
            known = hub.large.get(parts[1])
            right = known is not None and hashlib.sha256(known).hexdigest() == parts[1]
            return self._send(200 if right else 400, {})
        large = path.endswith(".git/info/lfs/objects/batch")
        name = f"{parts[0]}/{parts[1].removesuffix('.git')}" if large else "/".join(parts[2:4])
        repo = hub.repos.get(name)
        if repo is None:
            return self._send(404, {"error": "Repository not found"}, "RepoNotFound")
        if large:
            return self._send(
                200, {"transfer": "basic", "objects": [self._object(o) for o in json.loads(body)["objects"]]}
            )
        branch = parts[5] if len(parts) > 5 else "main"
        if parts[4:5] == ["branch"]:
            repo.branches[branch] = list(repo.branches["main"])
            return self._send(200, {})
        if branch not in repo.branches:
            return self._send(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        if parts[4:5] == ["preupload"]:
            return self._send(200, {"files": [self._mode(repo, branch, f) for f in json.loads(body)["files"]]})
        if parts[4:5] == ["commit"]:
            return self._commit(name, repo, branch, body)
        sha, files = repo.head(branch)
        told = {"id": name, "sha": sha, "private": repo.private, "siblings": [{"rfilename": f} for f in files]}
        return self._send(200, told)

    def _object(self, asked: dict) -> dict:
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.standin.large:
            return found
        place = f"{self.standin.url}/lfs/{asked['oid']}"
        return {**found, "actions": {"upload": {"href": place}, "verify": {"href": place}}}

    def _mode(self, repo: Repo, branch: str, asked: dict) -> dict:
        large = asked["path"].endswith(".safetensors")
        told = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        known = repo.head(branch)[1].get(asked["path"])
        if known is not None:
            blob = hashlib.sha256(known) if large else hashlib.sha1(b"blob %d\0" % len(known) + known)
            told["oid"] = blob.hexdigest()
        return told

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repo.head(branch)[0]):
            return self._send(412, {"error": "A commit has happened since"})
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.standin.large[value["oid"]]
        sha = repo.commit(branch, files, header["value"]["summary"])
        return self._send(
            200, {"commitUrl": f"{self.standin.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        )

    def _send(self, status: int, value: dict, code: str = "") -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(raw)
