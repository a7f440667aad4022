"""Tokens before a job is paid for: counted where that can be done, else an upper bound that says so."""

from __future__ import annotations

import builtins
import threading

import pytest

from ptst.hosted import tokens

tiktoken = pytest.importorskip("tiktoken", reason="needs the package tiktoken")
ROWS = [[{"role": "user", "content": "a\u00e9\u4e2d"}, {"role": "assistant", "content": ""}]]
LOAD = tokens.load_encoding  # before the fixture replaces it


@pytest.fixture
def encoding():
    """Of bytes and one merge: `us` is one token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"us": 256}
    return tiktoken.Encoding("tiny", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|end|>": 257})


def test_tokens_are_counted_by_the_models_own_tokenizer(monkeypatch, encoding):
    asked = []
    monkeypatch.setattr(tokens, "load_encoding", lambda name: asked.append(name) or encoding)
    counter = tokens.find_counter("gpt-3.5-turbo-0613")
    assert counter.exact and asked == ["cl100k_base"] and counter.name == "tiktoken cl100k_base"
    # 3 a row, 3 a message, the role (`user` is three, as `us` is one), the content; marks in a text are text
    assert counter.rows(ROWS) == [3 + (3 + 3 + 6) + (3 + 9 + 0)]
    assert counter.texts(["<|end|>"]) == [7]


def test_without_a_vocabulary_bytes_are_the_bound(monkeypatch):
    def gone(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokens, "load_encoding", LOAD)
    monkeypatch.setattr(tiktoken, "get_encoding", gone)
    counter = tokens.find_counter("gpt-4o-mini")
    assert not counter.exact and "upper bound" in counter.name and "could not load o200k_base" in counter.name
    assert counter.rows(ROWS) == [3 + (3 + 4 + 6) + (3 + 9 + 0)]
    assert "does not know my-own" in tokens.find_counter("my-own").name
    monkeypatch.setattr(tokens, "find_spec", lambda _name: None)
    assert "tiktoken is not installed" in tokens.find_counter("gpt-4o").name


def test_a_vocabulary_that_never_arrives_is_not_waited_for(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(tokens, "PATIENCE", 0.01)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _name: never.wait(10))
    assert LOAD("cl100k_base") is None
    never.set()


def test_the_bound_is_above_the_count(encoding):
    texts = ["use us", "\u4e2d\u6587", "", builtins.__doc__ or ""]
    exact = list(map(len, encoding.encode_ordinary_batch(texts)))
    assert all(n <= most for n, most in zip(exact, tokens._bound("x").texts(texts), strict=True))
