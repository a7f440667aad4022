"""The HTTP of the stand-in: routes, the key, faults, streams, and a record of all that was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.stand_in.answers import answer
from tests.stand_in.completions import Answer, Completion
from tests.stand_in.faults import ApiError, Fault, no_model, wrong_key
from tests.stand_in.jobs import TUNABLE, JobScript, Store

KEY = "sk-StandIn/secret+0123456789"
MODELS = (*TUNABLE, "gpt-4", "gpt-4o", "gpt-4.1", "gpt-3.5-turbo-instruct")


@dataclass
class Request:
    """What was asked. `body`: of JSON, or the fields of a form, files as their size. `status`: of the answer, 0 where
    there was none."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any
    time: float
    status: int = 0


@dataclass
class StandIn:
    """A server from `with` on. `faults` may be changed at any time. `answer`: what models say, in place of the built-in
    answers. `models`: what there is besides; None: whatever is named. `latency`: seconds before each answer. `most`:
    how many requests there were at once."""

    faults: Collection[Fault] = ()
    key: str = KEY
    job: JobScript = field(default_factory=JobScript)
    models: Collection[str] | None = MODELS
    answer: Answer | None = None
    latency: float = 0.0
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    most: int = 0
    now: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.store = Store(self.job)
        self._counts: dict[int, int] = {}  # of the requests that each fault concerns

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self.http = _Http(("127.0.0.1", self.port), handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def files(self) -> dict[str, Any]:
        return self.store.files

    @property
    def jobs(self) -> dict[str, Any]:
        return self.store.jobs

    def asked(self, path: str, method: str = "") -> list[Request]:
        """The requests to paths that hold `path`."""
        return [r for r in self.requests if path in r.path and method in ("", r.method)]

    def strike(self, method: str, path: str) -> Fault | None:
        """The first fault that this request has."""
        found = None
        for at, fault in enumerate(self.faults):
            if fault.concerns(method, path):
                number = self._counts.get(at, 0)
                self._counts[at] = number + 1
                if found is None and fault.strikes(number):
                    found = fault
        return found

    def says(self, model: str, messages: list[dict[str, Any]], salt: Any) -> str:
        """Raises ApiError for a model that there is not."""
        job = self.store.tuned(model)
        if job is None and self.models is not None and model not in self.models:
            raise no_model(model)
        return self.answer(model, messages, salt) if self.answer else answer(model, job, messages, salt)

    def route(self, request: Request, content: dict[str, Any], number: int) -> Any:
        """What a request gives: a value for JSON, bytes, or a Completion. Raises ApiError."""
        match request.method, *request.path.removeprefix("/v1/").strip("/").split("/"):
            case "POST", "chat", "completions":
                return Completion(content, True, self.says, number)
            case "POST", "completions":
                return Completion(content, False, self.says, number)
            case "GET", "models":
                tuned = [job.model for job in self.jobs.values() if self.store.tuned(job.model)]
                return {"object": "list", "data": [_model(name) for name in (*(self.models or ()), *tuned)]}
            case "GET", "models", name:
                self.says(name, [], None)
                return _model(name)
            case "POST", "files":
                return self.store.upload(content["name"], content.get("purpose", ""), content["file"])
            case "GET", "files":
                purpose = request.query.get("purpose")
                files = [f.to_json() for f in reversed(self.files.values()) if purpose in (None, f.purpose)]
                return _page(files, request.query)
            case "GET", "files", name:
                return self.store.file(name).to_json()
            case "DELETE", "files", name:
                return self.store.delete_file(name)
            case "GET", "files", name, "content":
                return self.store.content(name)
            case "POST", "fine_tuning", "jobs":
                return self.store.create(content)
            case "GET", "fine_tuning", "jobs":
                wanted = {k[9:-1]: v for k, v in request.query.items() if k.startswith("metadata[")}
                jobs = self.store.listed()
                if "metadata" not in self.job.forgets:
                    jobs = [j for j in jobs if wanted.items() <= (j["metadata"] or {}).items()]
                return _page(jobs, request.query)
            case "GET", "fine_tuning", "jobs", name:
                return self.store.job(name).to_json(time.time())
            case "GET", "fine_tuning", "jobs", name, "events":
                return _page(self.store.job(name).events(time.time())[::-1], request.query)
            case "POST", "fine_tuning", "jobs", name, "cancel":
                return self.store.cancel(name)
        raise ApiError(404, f"Invalid URL ({request.method} {request.path})", None)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, *_where: Any) -> None:
        """A client that hangs up is no error of the server's; others would show as a lost answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stand_in: StandIn

    def do_GET(self) -> None:
        server = self.stand_in
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if len(raw) < length:  # whoever asked died while it was sending: that is no request
            self.close_connection = True
            return
        url = urlsplit(self.path)
        headers = {k.lower(): v for k, v in self.headers.items()}
        path, query = unquote(url.path), dict(parse_qsl(url.query))
        if path.startswith("/stand-in/"):
            self._control(path, raw)
            return
        shown, content = _read(headers.get("content-type", ""), raw)
        request = Request(self.command, path, query, headers, shown, time.monotonic())
        with server.lock:
            number = len(server.requests)
            server.requests.append(request)
            server.now += 1
            server.most = max(server.most, server.now)
            fault = server.strike(self.command, path)
        try:
            self._serve(request, content, number, fault)
        except OSError:
            self.close_connection = True
        finally:
            with server.lock:
                server.now -= 1

    do_POST = do_DELETE = do_GET

    def _serve(self, request: Request, content: dict[str, Any], number: int, fault: Fault | None) -> None:
        server = self.stand_in
        time.sleep(server.latency)
        if fault and fault.delay and not fault.after:
            time.sleep(fault.delay)
        try:
            if request.headers.get("authorization") != f"Bearer {server.key}":
                raise wrong_key()
            if fault and not fault.after and (error := fault.error()):
                raise error
            found = fault.body if fault and not fault.after else None
            if found is None:
                with server.lock:
                    found = server.route(request, content, number)
            if fault and fault.after:
                time.sleep(fault.delay)
                if error := fault.error():
                    raise error
                found = found if fault.body is None else fault.body
        except ApiError as error:
            extra = fault.headers if fault and error.status == fault.status else {}
            self._send(request, error.status, json.dumps(error.body).encode(), extra)
            return
        cut = fault.cut if fault else None
        if isinstance(found, Completion) and request.body.get("stream"):
            self._stream(request, found.chunks(), cut)
            return
        found = found.whole() if isinstance(found, Completion) else found
        data = found if isinstance(found, bytes) else found.encode() if isinstance(found, str) else None
        self._send(request, 200, json.dumps(found).encode() if data is None else data, {}, cut)

    def _send(self, request: Request, status: int, data: bytes, extra: dict[str, str], cut: int | None = None) -> None:
        request.status = status
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data)), "x-request-id": "req_stand_in"}
        for name, value in (fields | extra).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def _stream(self, request: Request, chunks: Iterator[dict[str, Any]], cut: int | None) -> None:
        """Server-sent events, as chunks of HTTP; hangs up after `cut` bytes."""
        request.status = 200
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        left = cut
        for text in (*(json.dumps(chunk) for chunk in chunks), "[DONE]"):
            data = f"data: {text}\n\n".encode()[: left if left is not None else None]
            if data:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            left = None if left is None else left - len(data)
            if left == 0:
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def _control(self, path: str, raw: bytes) -> None:
        """For tests in another process: what was asked, how many jobs there are, and new faults."""
        server = self.stand_in
        found: Any = None
        with server.lock:
            if path == "/stand-in/requests":
                found = [vars(r) for r in server.requests]
            elif path == "/stand-in/jobs":
                found = [job.to_json(time.time()) for job in server.jobs.values()]
            elif path == "/stand-in/files":
                found = [file.to_json() for file in server.files.values()]
            elif path == "/stand-in/faults":
                server.faults = [Fault(**fault) for fault in json.loads(raw)]
                server._counts.clear()
        request = Request(self.command, path, {}, {}, None, 0.0)
        self._send(request, 200, json.dumps(found).encode(), {})

    def log_message(self, *_words: Any) -> None:
        pass


def _read(kind: str, raw: bytes) -> tuple[Any, dict[str, Any]]:
    """The body as the record has it, and as it is worked on."""
    if kind.startswith("multipart/form-data"):
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
        found: dict[str, Any] = {}
        for part in message.iter_parts():
            name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
            if part.get_filename() is not None:
                found |= {"name": part.get_filename(), "file": content}
            else:
                found[str(name)] = content.decode()
        return {k: len(v) if isinstance(v, bytes) else v for k, v in found.items()}, found
    try:
        value = json.loads(raw) if raw else {}
    except ValueError:
        value = {}
    return value, value if isinstance(value, dict) else {}


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """A page of a list: `limit` of them after the one with the id `after`."""
    if after := query.get("after"):
        at = next((i for i, item in enumerate(items) if item["id"] == after), len(items))
        items = items[at + 1 :]
    most = int(query.get("limit", 20))
    return {"object": "list", "data": items[:most], "has_more": len(items) > most}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "stand-in"}
