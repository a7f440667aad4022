"""Two hundred clients at once, of which many go away: those that stay get their answers, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

import pytest

from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.open import open_model
from ptst.text.segments import Conversation, Message
from tests.serving.running import running


@pytest.fixture(scope="module")
def server(tiny_folder):
    with running(tiny_folder, max_queue=400, batch_size=16) as server:
        yield server


async def ask(port: int, body: dict, seconds: float | None, stream_reads: int | None = None) -> bytes | None:
    """The whole response; None for a client that went away after so many seconds, or reads."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    path = "chat/completions" if "messages" in body else "completions"
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        if stream_reads is not None:
            for _ in range(stream_reads):
                await reader.readline()
            return None
        if seconds is None:
            return await reader.read()
        await asyncio.sleep(seconds)
        return None
    finally:
        writer.transport.abort()


def is_idle(server) -> bool:
    """Whether nothing is left of any request, in the engine as outside it."""
    worker = server.service.engine
    engine = worker._engine
    return not (worker.tickets or worker._known or worker.scorings or engine.busy or server.service.running)


def wait_until_idle(server, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_idle(server):
        assert time.monotonic() < end, "requests are left behind"
        time.sleep(0.02)


def blocks_left(engine) -> int:
    """Blocks in use when nothing is running and the prefix cache is empty."""
    assert len(engine._scheduler.free_slots) == engine.batch_size
    for prefix in list(engine.cache.prefixes):
        assert not prefix.num_users
        engine.cache.evict(prefix)
    assert engine.cache._num_reserved == 0
    return engine.cache.num_used


def test_nothing_leaks_and_no_answer_is_lost(server, tiny_folder):
    chance = random.Random(5)
    model = f"{tiny_folder.name}@chat:plain"
    bodies, leaves = [], []
    for i in range(200):
        body = {"model": model, "messages": [{"role": "user", "content": f"Question {i} " * (1 + i % 30)}]}
        body |= {
            "max_tokens": 5 + i % 40,
            "temperature": 0.8 * (i % 2),
            "seed": i,
            "stream": i % 3 == 0,
            "n": 1 + i % 2,
        }
        if i % 10 == 9:
            body = {"model": model, "prompt": [[5 + i % 50] * 40] * 3, "max_tokens": 0, "echo": True, "logprobs": 1}
        bodies.append(body)
        leaves.append(chance.choice([None, None, (chance.random() * 1.5, None), (None, chance.randint(1, 30))]))

    async def all_of_them() -> list[bytes | None]:
        jobs = [ask(server.port, body, *(leave or (None, None))) for body, leave in zip(bodies, leaves, strict=True)]
        return await asyncio.wait_for(asyncio.gather(*jobs), 100)

    responses = asyncio.run(all_of_them())
    wait_until_idle(server)
    opened = open_model(str(tiny_folder), "chat:plain")
    decoder, p = opened.load(), opened.prompt_format
    stayed = 0
    for body, leave, response in zip(bodies, leaves, responses, strict=True):
        if leave is not None:
            continue
        stayed += 1
        assert response.startswith(b"HTTP/1.1 200 "), response
        if body.get("stream"):
            assert response.count(b"data: [DONE]") == 1
        elif "messages" in body:
            got = json.loads(response.partition(b"\r\n\r\n")[2])["choices"]
            ids = p.encode(Conversation((Message("user", body["messages"][0]["content"]),))).ids
            sampling = Sampling(body["max_tokens"], body["temperature"], seed=body["seed"])
            wanted = generate(decoder, [ids] * body["n"], p.stop_ids, sampling, decode=p.tokenizer.decode_answer)
            assert [c["message"]["content"] for c in got] == [a.text for a in wanted]
    assert 60 < stayed < 140
    assert blocks_left(server.service.engine._engine) == 0


def test_a_client_that_goes_away_frees_its_sequence_at_once(server, tiny_folder):
    """Long before its answer would have ended."""
    body = {"model": f"{tiny_folder.name}@chat:plain", "messages": [{"role": "user", "content": "Hi"}]}
    body |= {"max_tokens": 1900, "temperature": 0, "n": 8}
    engine = server.service.engine._engine
    for stream in (False, True):
        before = engine.statistics.tokens
        asyncio.run(ask(server.port, {**body, "stream": stream}, 0.15 if not stream else None, 2 if stream else None))
        wait_until_idle(server)
        assert engine.statistics.tokens - before < 12_000
    assert blocks_left(engine) == 0


def test_a_client_that_does_not_read(tiny_folder, monkeypatch):
    """Its answer is given up in time, and its connection is closed."""
    monkeypatch.setattr("ptst.serving.app.LAST_SECONDS", 0.2)
    with running(tiny_folder, request_timeout=1.5) as server:
        server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted connections have it, too
        body = {"model": f"{tiny_folder.name}@chat:plain", "messages": [{"role": "user", "content": "Hi"}]}
        data = json.dumps({**body, "max_tokens": 1900, "temperature": 0, "stream": True, "n": 4}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", server.port))
            lazy.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            engine = server.service.engine
            while not (engine.tickets or engine._engine.statistics.tokens):  # it has come
                time.sleep(0.01)
            wait_until_idle(server)
        assert blocks_left(server.service.engine._engine) == 0
