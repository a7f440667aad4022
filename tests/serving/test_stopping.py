"""The command as a user runs and stops it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ptst.errors import UserError
from ptst.serve import gathered, run_serve
from ptst.serving.config import API_KEY, ServeConfig
from tests.conftest import ROOT
from tests.tiny import write_tiny_model

pytest.importorskip("starlette", reason="the server needs pip install 'ptst-lab[serve]'")

HI = [{"role": "user", "content": "Hi"}]
LONG = {"model": "model@chat:plain", "messages": HI, "max_tokens": 1900, "temperature": 0}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    (folder / "model").mkdir()
    # Answers without an end, in a model that is slow enough to be interrupted.
    write_tiny_model(folder / "model", num_hidden_layers=12, hidden_size=128, intermediate_size=512)
    generation = folder / "model/generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [0]}))
    return folder


def start(here, *flags: str, **environment: str) -> subprocess.Popen:
    known = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "ptst.serve", "--model", "model", "--template", "chat:plain", "--kv-memory", "0.2"]
    return subprocess.Popen([*line, *flags], cwd=here, stderr=subprocess.PIPE, text=True, env=known | environment)


@contextmanager
def served(here, *flags: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """The process, its address and its lines of standard error."""
    process, lines = start(here, "--port", "0", *flags), []
    try:
        for line in process.stderr:
            lines.append(line)
            if "listening on" in line:
                break
        url = lines[-1].partition("http://")[2].split("/v1")[0]
        rest = threading.Thread(target=lambda: lines.extend(process.stderr))
        rest.start()
        yield process, f"http://{url}/v1", lines
    finally:
        process.kill()
        process.wait()
    rest.join(60)


def in_background(url: str, body: dict) -> tuple[threading.Thread, list]:
    """A streamed request whose answer has begun, and the list of its lines (an error that ends it comes last)."""
    found: list = []
    begun = threading.Event()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}

    def ask() -> None:
        try:
            with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=200) as response:
                for line in filter(None, response.iter_lines()):
                    found.append(line)
                    begun.set()
        except httpx.HTTPError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(60), found
    return thread, found


def test_running_answers_finish_and_new_ones_are_refused(here):
    with served(here, "--grace", "250") as (process, url, lines):
        thread, found = in_background(url, {**LONG, "max_tokens": 900})
        process.terminate()
        while httpx.get(f"{url[:-3]}/health").status_code == 200:
            time.sleep(0.01)
        refused = httpx.post(f"{url}/chat/completions", json=LONG, timeout=10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
        thread.join(200)
        assert found[-1] == "data: [DONE]"
        assert json.loads(found[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 900
        assert process.wait(120) == 0
    assert not any("Traceback" in line for line in lines)


@pytest.mark.thorough
def test_a_second_signal_ends_at_once(here):
    with served(here, "--grace", "250") as (process, url, _):
        thread, found = in_background(url, LONG)
        process.send_signal(signal.SIGINT)
        while httpx.get(f"{url[:-3]}/health").status_code == 200:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 128 + signal.SIGINT
        thread.join(60)
        assert isinstance(found[-1], httpx.HTTPError)


def test_a_port_in_use_is_one_sentence(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(here, "--port", str(port))
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told == f"ptst.serve: --port {port} is in use; stop what uses it, or give another --port\n"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 lets other machines use the models without a key"),
        ({"host": "192.0.2.1", "allow_no_key": True}, "cannot listen on 192.0.2.1"),
        ({"host": "no such host"}, "host no such host"),
        ({"port": 70000}, "port is 70000; it must be between 0 and 65535"),
        ({"template": ("chat:nobody",)}, "unknown template 'chat:nobody'"),
        ({"template": ("chat:plain", "plain")}, "template chat:plain comes twice"),
        ({"max_queue": -1}, "max_queue is -1; it must be at least 0"),
        ({"max_body": 0.0}, "max_body is 0.0; it must be above 0"),
        ({"request_timeout": float("nan")}, "request_timeout is nan"),
        ({"model": None, "checkpoint": ("model",)}, "run.json"),
        ({"model": "elsewhere"}, "elsewhere"),
        ({"adapter": ("nowhere/at/all",)}, "nowhere/at/all"),
    ],
)
def test_mistakes_of_the_settings(here, monkeypatch, settings, told):
    monkeypatch.chdir(here)
    monkeypatch.delenv(API_KEY, raising=False)
    settings = {"model": "model", "port": 0, "template": ("chat:plain",), **settings}
    settings["checkpoint"] = tuple(map(Path, settings.get("checkpoint", ())))
    with pytest.raises(UserError) as error:
        run_serve(ServeConfig(**settings))
    assert told in str(error.value)


def test_flags_may_come_several_times():
    words = ["--checkpoint", "a", "--port", "5", "--checkpoint=b", "--template", "x", "y", "--json", "--template", "z"]
    assert gathered(words) == ["--port", "5", "--json", "--checkpoint", "a", "b", "--template", "x", "y", "z"]


def test_the_key_is_no_flag(here):
    process = start(here, "--port", "0", "--api-key", "s3cret", PTST_SERVE_API_KEY="s3cret")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--api-key-file" in told
