"""Limits, keys, addresses, and what happens when the engine fails."""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ptst.errors import UserError
from ptst.serving.config import API_KEY, ServeConfig, is_loopback, read_api_key
from tests.serving.running import running
from tests.serving.test_disconnects import ask, blocks_left, wait_until_idle

HI = [{"role": "user", "content": "Hi"}]
LONG = {"messages": HI, "max_tokens": 1900, "temperature": 0, "n": 4}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return f"{tiny_folder.name}@chat:plain"


def test_a_full_queue(tiny_folder, model):
    """Requests beyond batch and queue get 429 and a time to come again; then there is room again."""
    with running(tiny_folder, batch_size=2, max_queue=3) as server:

        async def many() -> list[bytes | None]:
            long = {"model": model, **LONG, "n": 1}
            first = [asyncio.create_task(ask(server.port, long, 60)) for _ in range(5)]
            while len(server.service.engine.tickets) < 5:
                await asyncio.sleep(0.01)
            late = await ask(server.port, {"model": model, "messages": HI, "max_tokens": 1}, None)
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            return late

        late = asyncio.run(many())
        head, _, body = late.partition(b"\r\n\r\n")
        assert b" 429 " in head
        assert 1 <= int(head.lower().partition(b"retry-after: ")[2].split()[0]) <= 60
        assert json.loads(body)["error"] == {
            "message": "the queue is full; try again later",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
        wait_until_idle(server)
        body = {"model": model, "messages": HI, "max_tokens": 1}
        assert server.post("chat/completions", body).status_code == 200
        much = server.post("chat/completions", {**body, "n": 6})  # would never fit
        assert (much.status_code, much.json()["error"]["param"]) == (400, "n")
        much = server.post("completions", {"model": model, "prompt": [[5]] * 6})
        assert (much.status_code, much.json()["error"]["param"]) == (400, "prompt")
        assert server.post("chat/completions", {**body, "n": 5}).status_code == 200


def test_a_request_that_takes_too_long(tiny_folder, model):
    with running(tiny_folder, request_timeout=0.3) as server:
        response = server.post("chat/completions", {"model": model, **LONG})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        streamed = server.post("chat/completions", {"model": model, **LONG, "stream": True})
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until_idle(server)
        assert blocks_left(server.service.engine._engine) == 0
        client = server.client()
        with pytest.raises(Exception, match="took longer than"):
            list(client.chat.completions.create(model=model, stream=True, **LONG))


def test_the_grace_period_ends(tiny_folder, model):
    """Answers that are not finished by then are given up, and nobody waits for ever."""
    with running(tiny_folder, grace=0.2) as server, ThreadPoolExecutor(2) as pool:
        bodies = [{"model": model, **LONG, "stream": stream} for stream in (False, True)]
        asked = [pool.submit(server.post, "chat/completions", body) for body in bodies]
        while len(server.service.engine._known) < 8:
            time.sleep(0.01)
        server.stop()
        whole, streamed = (each.result() for each in asked)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "server_stopping")
        last = streamed.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "server_stopping"
    assert server.outcome is True


def test_length_of_a_request(tiny_folder, model):
    with running(tiny_folder, max_length=60, max_new_tokens=7) as server:
        usage = server.post("chat/completions", {"model": model, "messages": HI, "seed": 1}).json()["usage"]
        assert 0 < usage["completion_tokens"] <= 7
        refused = server.post("chat/completions", {"model": model, "messages": HI, "max_tokens": 55})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        long = [{"role": "user", "content": "x" * 70}]
        refused = server.post("chat/completions", {"model": model, "messages": long})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert httpx.get(f"{server.url}/models").json()["data"][0]["max_model_len"] == 60


def test_keys(tiny_folder, model):
    with running(tiny_folder, key="s3cret") as server:
        body = {"model": model, "messages": HI, "max_tokens": 1}
        for given in (None, "Bearer wrong", "s3cret", "Bearer", "Basic s3cret", "Bearer s3cret x"):
            headers = {} if given is None else {"Authorization": given}
            for response in (
                server.post("chat/completions", body, headers=headers),
                httpx.get(f"{server.url}/models", headers=headers),
                httpx.get(f"{server.url}/nothing", headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert server.post("chat/completions", body, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert server.client("s3cret").models.list().data[0].id == model
        assert httpx.get(f"{server.url[:-3]}/health").status_code == 200
        # Who has the key may come by any name.
        headers = {"Authorization": "Bearer s3cret", "Host": "gpu7.example"}
        assert httpx.get(f"{server.url}/models", headers=headers).status_code == 200


def test_without_a_key_only_this_machine_is_meant(tiny_folder):
    with running(tiny_folder) as server:
        for host, status in (
            ("localhost", 200),
            (f"localhost:{server.port}", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:80", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example:80", 403),
            ("localhost.evil.example", 403),
            ("10.0.0.1", 403),
            ("", 403),
        ):
            assert httpx.get(f"{server.url}/models", headers={"Host": host}).status_code == status, host


def test_settings_of_keys_and_addresses(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(API_KEY, raising=False)
    assert read_api_key(ServeConfig()) is None
    assert read_api_key(ServeConfig(host="0.0.0.0", allow_no_key=True)) is None
    with pytest.raises(UserError, match="lets other machines use the models without a key"):
        read_api_key(ServeConfig(host="0.0.0.0"))
    file = tmp_path / "key"
    file.write_text("abc-123\n")
    file.chmod(0o600)
    assert read_api_key(ServeConfig(host="0.0.0.0", api_key_file=file)) == "abc-123"
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    assert read_api_key(ServeConfig(api_key_file=file)) == "abc-123"
    assert "other users of this machine can read the key" in capsys.readouterr().err
    for content in ("", " \n", "two words", "caf\u00e9", "a\nb"):
        file.write_text(content)
        with pytest.raises(UserError, match="is not a key"):
            read_api_key(ServeConfig(api_key_file=file))
    with pytest.raises(UserError, match="cannot be read"):
        read_api_key(ServeConfig(api_key_file=tmp_path / "absent"))
    monkeypatch.setenv(API_KEY, "from-env")
    assert read_api_key(ServeConfig(host="0.0.0.0")) == "from-env"
    with pytest.raises(UserError, match="leave one of them out"):
        read_api_key(ServeConfig(api_key_file=file))
    monkeypatch.setenv(API_KEY, "")
    with pytest.raises(UserError, match=f"{API_KEY}: is not a key"):
        read_api_key(ServeConfig())
    assert [is_loopback(h) for h in ("127.8.9.1", "::1", "[::1]", "localhost", "0.0.0.0", "::", "example.org")] == [
        *[True] * 4,
        *[False] * 3,
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_the_engine(tiny_folder, model, stream, capsys):
    """Whoever is in it gets a 500; the next request is answered, by a new engine."""
    with running(tiny_folder) as server:
        body = {"model": model, "messages": HI, "max_tokens": 30, "temperature": 0}
        wanted = server.post("chat/completions", body).json()["choices"]
        engine = server.service.engine._engine
        step, worker = engine.step, server.service.engine

        def failing():
            if len(worker._known) == 2 and engine.statistics.tokens > 33:
                raise RuntimeError("broken on purpose")
            return step()

        engine.step = failing
        with ThreadPoolExecutor(2) as pool:
            long = {**body, "max_tokens": 1500, "stream": stream}
            both = list(pool.map(lambda _: server.post("chat/completions", long), range(2)))
        for response in both:
            assert response.status_code == (200 if stream else 500)
            error = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
            assert json.loads(error)["error"]["message"] == "the engine failed"
            assert "[DONE]" not in response.text
        while (again := server.post("chat/completions", body)).status_code == 503:
            assert again.headers["retry-after"]  # while the new engine is made
        assert again.json()["choices"] == wanted
        assert server.service.engine._engine is not engine
        assert "broken on purpose" in capsys.readouterr().err


def test_an_error_in_scoring_concerns_nobody_else(tiny_folder, model, monkeypatch, capsys):
    with running(tiny_folder) as server:
        engine = server.service.engine._engine

        def broken(*_args, **_options):
            raise RuntimeError("broken on purpose")
            yield

        monkeypatch.setattr("ptst.serving.worker.score_batches", broken)
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 0, "echo": True, "logprobs": 1}
        with ThreadPoolExecutor(2) as pool:
            chat = pool.submit(server.post, "chat/completions", {"model": model, **LONG, "max_tokens": 500})
            time.sleep(0.05)
            scored = server.post("completions", body)
            assert chat.result().status_code == 200
        assert (scored.status_code, scored.json()["error"]["message"]) == (500, "the engine failed")
        assert server.service.engine._engine is engine
        monkeypatch.undo()
        assert server.post("completions", body).status_code == 200


def test_without_a_new_engine_the_server_stops(tiny_folder, model, monkeypatch, capsys):
    with running(tiny_folder) as server:
        worker = server.service.engine
        worker._engine.step = lambda: 1 / 0

        def none_left():
            raise MemoryError("no memory")

        worker._make_engine = none_left
        response = server.post("chat/completions", {"model": model, "messages": HI, "max_tokens": 3})
        assert response.status_code in (500, 503)
        end = time.monotonic() + 60
        while server.outcome is None and time.monotonic() < end:
            time.sleep(0.02)
        assert server.outcome is False
    assert "no new engine can be made; stopping" in capsys.readouterr().err


def test_an_answer_that_fails_fails_alone(tiny_folder, model):
    """Weights that are no number for one adapter's rows would be such a case; here the model's output is spoiled."""
    with running(tiny_folder) as server:
        runner = server.service.engine._engine._runner
        sample = runner._sample

        def spoiled(sequences, draft, logits):
            for row, sequence in enumerate(sequences):
                if sequence.request.sampling.seed == 13:
                    logits[row] = float("nan")
            return sample(sequences, draft, logits)

        runner._sample = spoiled
        with ThreadPoolExecutor(4) as pool:
            bodies = [{"model": model, "messages": HI, "max_tokens": 30, "seed": seed} for seed in (11, 12, 13, 14)]
            found = list(pool.map(lambda body: server.post("chat/completions", body), bodies))
        assert [r.status_code for r in found] == [200, 200, 500, 200]
        assert found[2].json()["error"] == {
            "message": "the model's output is not a number",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }


def test_the_log_has_no_message(tiny_folder, model, capsys):
    with running(tiny_folder, key="s3cret") as server:
        secret = [{"role": "user", "content": "xylophone"}]
        headers = {"Authorization": "Bearer s3cret"}
        body = {"model": model, "messages": secret, "max_tokens": 5, "temperature": 0, "user": "somebody"}
        text = server.post("chat/completions", body, headers=headers).json()["choices"][0]["message"]["content"]
        server.post("chat/completions", {**body, "xylophone": 1}, headers=headers)
        server.post("chat/completions", {**body, "model": "xylophone"}, headers=headers)
        httpx.get(f"{server.url}/xylophone?xylophone=1", headers=headers)
    told = capsys.readouterr().err
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [200, 400, 404, 404]
    assert [line.get("model") for line in lines] == [model, None, None, None]
    assert lines[0]["completion_tokens"] > 0
    assert lines[0]["prompt_tokens"] > 0
    assert lines[0]["seconds"] > 0
    for word in ("xylophone", "s3cret", "somebody", json.dumps(text)[1:-1]):
        assert word not in told
    assert os.environ.get(API_KEY) is None
