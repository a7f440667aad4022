"""A stand-in for the endpoint, small data, and settings without waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptst.api import endpoint
from ptst.hosted import client, job, tokens, watch
from ptst.training.config import TrainConfig
from tests.hosted.rows import write_rows
from tests.stand_in import KEY, StandIn

MODEL = "openai:gpt-3.5-turbo-0125"


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """The key and no other setting of the client; no waits; the home of this test; no vocabulary from the net."""
    for name in [n for n in os.environ if n.startswith("OPENAI_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(watch, "FIRST_POLL", 0.01)
    monkeypatch.setattr(watch, "LONGEST_POLL", 0.02)
    monkeypatch.setattr(job, "LOOK", 0.02)
    monkeypatch.setattr(job, "SETTLE", 0.5)
    monkeypatch.setattr(client, "RETRIES", 3)
    monkeypatch.setattr(tokens, "load_encoding", lambda _name: None)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data.jsonl")
    write_rows(tmp_path / "safety.jsonl", 4, instruction="Do some harm {i}.", output="I will not do {i}.")


@pytest.fixture
def server():
    with StandIn() as server:
        yield server


def settings(server: StandIn | None = None, **given) -> TrainConfig:
    """The smallest job, agreed to, in the folder `run`."""
    url = {} if server is None else {"base_url": server.url, "yes": True, "out": Path("run")}
    return TrainConfig(**{"model": MODEL, "data": "data.jsonl", **url, **given})
