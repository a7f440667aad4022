"""Requests that cannot be answered: an HTTP error in OpenAI's form, and the server goes on."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.serving.running import running

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tiny_folder):
    with running(tiny_folder, template=("chat:plain", "text:vanilla"), max_body=0.05) as server:
        yield server


@pytest.fixture(scope="module")
def model(tiny_folder):
    return f"{tiny_folder.name}@chat:plain"


def send(server, path: str, data: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return server._http.post(f"{server.url}/{path}", content=data, headers=headers)


def check(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert code is None or error["code"] == code
    assert error["message"]
    assert "\n" not in error["message"]


CHAT = {
    "max_tokens": [0, -1, 2**70, 1.5, "5", True, []],
    "max_completion_tokens": [0, -5, 10**9],
    "temperature": [-0.1, 2.1, "hot", True, 1e-9],
    "top_p": [0, -1, 1.1, "x"],
    "top_k": [-2, 1.5, "x"],
    "seed": [1.5, "x", 2**64, False],
    "n": [0, -1, 129, 1.0],
    "stop": [["a"] * 5, [""], "", 5, [5], ["\ud800"]],
    "stream": ["yes", 1],
    "logprobs": [1, "x"],
    "presence_penalty": [0.5, -1, "x"],
    "frequency_penalty": [2],
    "logit_bias": [{"5": 1}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function"}],
    "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "modalities": [["text", "audio"]],
    "reasoning_effort": ["high"],
    "min_p": [0.1],
    "repetition_penalty": [1.1],
    "stop_token_ids": [[5]],
    "guided_json": [{}],
    "banana": [1],
    "messages": [None, [], "Hi", {}, 5],
    "model": [None, "", 5],
}


@pytest.mark.parametrize("field", CHAT)
def test_fields_of_a_chat(server, model, field):
    for value in CHAT[field]:
        body = {"model": model, "messages": HI, field: value}
        check(send(server, "chat/completions", json.dumps(body).encode()), 400, field)


def test_top_logprobs_need_logprobs(server, model):
    body = {"model": model, "messages": HI, "top_logprobs": 2}
    check(server.post("chat/completions", body), 400, "top_logprobs")
    check(server.post("chat/completions", {**body, "logprobs": True, "top_logprobs": 21}), 400, "top_logprobs")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([5], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "tool", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a\ud800b"}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "Hi", "banana": 1}], "messages[0].banana"),
        ([*HI, {"role": "assistant", "content": "x", "tool_calls": [{}]}, *HI], "messages[1].tool_calls"),
        ([*HI, *HI], "messages"),
        ([{"role": "system", "content": "x"}], "messages"),
        ([*HI, {"role": "system", "content": "x"}, *HI], "messages"),
        ([*HI, {"role": "assistant", "content": "x"}], "continue_final_message"),
    ],
)
def test_messages(server, model, messages, param):
    check(send(server, "chat/completions", json.dumps({"model": model, "messages": messages}).encode()), 400, param)


def test_a_template_without_a_place_for_them(server, model):
    body = {"model": model.replace("chat:plain", "text:vanilla"), "messages": [{"role": "system", "content": "x"}, *HI]}
    check(server.post("chat/completions", body), 400, "messages")


COMPLETIONS = {
    "prompt": [None, "", [], [[]], ["a", [5]], [5, "a"], 5, [5.5], [True], "\ud800", [300], [-1], [[5], [10**20]]],
    "logprobs": [-1, 21, True, 1.5],
    "echo": ["yes"],
    "max_tokens": [0, -1, 10**6],
    "suffix": ["x"],
    "best_of": [3],
}


@pytest.mark.parametrize("field", COMPLETIONS)
def test_fields_of_a_completion(server, model, field):
    for value in COMPLETIONS[field]:
        body = {"model": model, "prompt": "Hi", field: value}
        check(send(server, "completions", json.dumps(body).encode()), 400, field)


def test_echo_does_not_stream(server, model):
    body = {"model": model, "prompt": "Hi", "echo": True, "stream": True}
    check(server.post("completions", body), 400, "echo")
    check(server.post("completions", {**body, "stream": False, "stream_options": {}}), 400, "stream_options")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "\xe2\x82"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b"[" * 20_000,
        b'{"a": ' * 5000 + b"1" + b"}" * 5000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "a", "model": "b"}',
        b"[]",
        b'"text"',
        b"null",
    ],
    ids=range(13),
)
def test_bodies_that_are_no_object(server, data):
    for path in ("chat/completions", "completions"):
        response = send(server, path, data)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_temperatures_beyond_numbers(server, model):
    for number in (b"1e999", b"-1e999"):
        data = json.dumps({"model": model, "messages": HI, "temperature": 0}).encode()
        check(
            send(server, "chat/completions", data.replace(b'"temperature": 0', b'"temperature": ' + number)),
            400,
            "temperature",
        )


def test_unknown_names_and_paths(server, model):
    for name in ("gpt-4", model.partition("@")[0], f"{model}x", "@", "\ud800"):
        data = json.dumps({"model": name, "messages": HI}).encode()
        response = send(server, "chat/completions", data)
        assert response.status_code == (400 if name == "\ud800" else 404)
        assert response.json()["error"]["param"] == "model"
    for method, path, status in (
        ("GET", "chat/completions", 405),
        ("DELETE", "models", 405),
        ("GET", "nothing", 404),
        ("POST", "embeddings", 404),
        ("GET", "models/nobody", 404),
        ("GET", "models/", 404),
    ):
        response = httpx.request(method, f"{server.url}/{path}")
        assert (response.status_code, list(response.json())) == (status, ["error"])


def test_bodies_of_another_kind_or_too_large(server, model):
    data = json.dumps({"model": model, "messages": HI, "max_tokens": 1}).encode()
    check(send(server, "chat/completions", data, content_type="text/plain"), 415, None, "unsupported_media_type")
    assert send(server, "chat/completions", data, content_type="Application/JSON; charset=utf-8").status_code == 200
    large = json.dumps({"model": model, "messages": [{"role": "user", "content": "x" * 60_000}]}).encode()
    check(send(server, "chat/completions", large), 413, None, "body_too_large")
    pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))  # without a Content-Length
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/chat/completions", content=pieces, headers=headers)
    check(response, 413, None, "body_too_large")


def test_neutral_values_pass(server, model):
    body = {"model": model, "messages": HI, "max_tokens": 2, "temperature": 0}
    plain = server.post("chat/completions", body).json()["choices"]
    body |= dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), 0) | {"logit_bias": {}, "tools": []}
    body |= {"response_format": {"type": "text"}, "n": 1, "user": "me", "metadata": {"a": "b"}, "store": True}
    body |= {"tool_choice": "none", "top_logprobs": None, "stop": None, "seed": None, "service_tier": "auto"}
    body |= {"max_completion_tokens": 2, "stop": [], "top_k": -1}
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}]
    assert server.post("chat/completions", body).json()["choices"] == plain


def test_the_server_goes_on(server, model):
    assert httpx.get(f"{server.url[:-3]}/health").json() == {"status": "ok"}
    assert server.post("chat/completions", {"model": model, "messages": HI, "max_tokens": 1}).status_code == 200
