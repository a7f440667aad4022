"""A server in a thread of the test's process, on a port that is free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'ptst-lab[serve]'")
pytest.importorskip("uvicorn", reason="the server needs pip install 'ptst-lab[serve]'")

import httpx

from ptst.serving.config import ServeConfig
from ptst.serving.models import Catalog
from ptst.serving.server import Server, bind


class Running(Server):
    """`url` ends in /v1. `outcome`: what `run` returned or raised."""

    outcome: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """The response to a JSON body."""
        return self._http.post(f"{self.url}/{path}", json=body, **options)

    @cached_property
    def _http(self) -> httpx.Client:
        # Reading this machine's certificates would take longer than most requests.
        return httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_connections=None))

    def client(self, key: str = "none", **options: Any):
        """The real client, which does not ask again."""
        openai = pytest.importorskip("openai", reason="the client comes with .[dev]")
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **options)


@contextmanager
def running(model: Path | str | None, key: str | None = None, **settings: Any) -> Iterator[Running]:
    """Serve `model` (None: what the settings say) under chat:plain."""
    settings = {"template": ("chat:plain",), "port": 0, "batch_size": 8, "kv_memory": 0.02, **settings}
    config = ServeConfig(model=None if model is None else str(model), **settings)
    config.check()
    listening = bind(config)
    server = Running(Catalog(config), config, key, listening)
    ready = threading.Event()

    def run() -> None:
        try:
            server.outcome = asyncio.run(server.run(ready.set))
        except BaseException as error:
            server.outcome = error
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(60)
    try:
        if server.outcome is not None:
            raise server.outcome
        yield server
    finally:
        server.stop()
        thread.join(60)
        listening.close()
        assert not thread.is_alive()
