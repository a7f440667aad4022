"""A stand-in for an OpenAI-compatible endpoint: a local server that says what it should, faults included."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ptst.api import endpoint
from ptst.evaluation.graders.api import ApiAsk
from ptst.settings import ApiSettings
from ptst.text.segments import Message

KEY = "sk-Zq7/secret+0123456789"


@dataclass(frozen=True)
class Say:
    """What the server sends: `body` as JSON, or as it is where it is text. `delay`: seconds before it. `cut`: bytes
    after which it hangs up. `trickle`: seconds before each byte."""

    body: Any = "ok"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    trickle: float = 0.0


def reply(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return {"id": "1", "object": "chat.completion", "model": "m-2026", "choices": [choice], "usage": usage}


def fault(status: int, message: str = "no", headers: dict[str, str] | None = None, **error: Any) -> Say:
    return Say({"error": {"message": message, **error}}, status, headers or {})


Script = Callable[[dict[str, Any], int], Say]  # the request's body, and how many came before it


@dataclass
class Server:
    """`requests`: the bodies that came, in order; `paths`, `headers` (names in lower case) and `times`: theirs; `most`:
    how many there were at once."""

    script: Script
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    now: int = 0
    most: int = 0
    url: str = ""

    def take(self, path: str, headers: dict[str, str], raw: bytes) -> Say:
        with self.lock:
            number = len(self.requests)
            body = json.loads(raw)
            self.requests.append(body)
            self.paths.append(path)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        return self.script(body, number)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()


@contextmanager
def serve(script: Script | list[Say]) -> Iterator[Server]:
    """A server that follows the script: a function, or what it says in turn (the last again and again)."""
    if isinstance(script, list):
        turns = script
        server = Server(lambda _body, number: turns[min(number, len(turns) - 1)])
    else:
        server = Server(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            said = server.take(self.path, {k.lower(): v for k, v in self.headers.items()}, raw)
            try:
                self.send(said)
            except OSError:  # the other side hung up
                self.close_connection = True
            finally:
                with server.lock:
                    server.now -= 1

        def send(self, said: Say) -> None:
            time.sleep(said.delay)
            text = said.body if isinstance(said.body, str) else json.dumps(said.body)
            data = text.encode()
            kind = "text/html" if isinstance(said.body, str) else "application/json"
            self.send_response(said.status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if said.cut is not None:
                self.wfile.write(data[: said.cut])
                self.close_connection = True
            elif said.trickle:
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    time.sleep(said.trickle)
            else:
                self.wfile.write(data)

        def log_message(self, *_words: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.block_on_close = False
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def echo(body: dict[str, Any], _number: int) -> Say:
    return Say(reply("re: " + body["messages"][-1]["content"]))


def set_environment(monkeypatch) -> None:
    """The key and no other setting of the API's clients; repeats without waits."""
    for name in [n for n in os.environ if n.startswith(("OPENAI_", "PTST_MODEL_")) or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def asker(server: Server, folder: Path | None = None, model: str = "m", tokens: int = 9, **settings: Any) -> ApiAsk:
    ask = ApiAsk(model, tokens, ApiSettings(api_base_url=server.url, **{"api_timeout": 5.0, **settings}))
    if folder is not None:
        ask.keep_in(folder)
    return ask
