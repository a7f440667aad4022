"""Starting and stopping: the socket, the engine's thread, uvicorn, and signals.

The first SIGTERM or Ctrl-C ends the server gracefully: new requests get status 503, running ones may finish within the
grace period, then it exits with 0. The second ends it at once.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from ptst.errors import Setting, UserError
from ptst.packages import check_package
from ptst.progress import say
from ptst.serving.config import ServeConfig

if TYPE_CHECKING:
    import uvicorn

    from ptst.generation.engine import Engine
    from ptst.serving.app import Service
    from ptst.serving.models import Catalog

_POLL = 0.05  # seconds between looks at what is still running


def check_packages() -> None:
    """Raise UserError where the server's packages are missing."""
    for package in ("starlette", "uvicorn"):
        check_package(package, "serving needs", "serve")


def bind(config: ServeConfig) -> socket.socket:
    """The listening socket. Raises UserError for a port in use and an address that is not this machine's."""
    host = config.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError((Setting("host"), f" {config.host} is no address ({error.strerror})"), "give another") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)  # uvicorn listens when the models are there; until then, connections are refused
    except OSError as error:
        found.close()
        if error.errno in (98, 48, 10048):  # EADDRINUSE by system
            cause: tuple[str, ...] = (Setting("port"), f" {config.port} is in use")
            raise UserError(cause, ("stop what uses it, or give another ", Setting("port"))) from None
        cause = (f"cannot listen on {config.host}, ", Setting("port"), f" {config.port} ({error.strerror})")
        raise UserError(cause, "give another") from None
    return found


class Server:
    """A catalog's models behind a listening socket. `run` returns when the server has stopped, with whether it stopped
    because it was asked to."""

    def __init__(self, catalog: "Catalog", config: ServeConfig, key: str | None, listening: socket.socket):
        self.catalog, self.config, self.key, self.listening = catalog, config, key, listening
        self.port: int = listening.getsockname()[1]
        self.service: Service | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._died = False

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> bool:
        """Load the models and serve them until `stop`. Raises UserError for what cannot be loaded."""
        import uvicorn

        from ptst.serving.app import Service, application
        from ptst.serving.worker import EngineThread

        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        decoder = self.catalog.load()
        make_engine = lambda: self.catalog.engine(decoder)  # noqa: E731
        engine = EngineThread(_warmed(make_engine(), self.catalog), make_engine, self._on_death)
        service = self.service = Service(self.catalog, engine, self.config, self.key)
        settings = uvicorn.Config(
            application(service), log_config=None, access_log=False, lifespan="off", ws="none", server_header=False
        )
        http = uvicorn.Server(settings)
        http.capture_signals = _no_signals  # type: ignore[method-assign]
        serving = asyncio.create_task(http.serve([self.listening]))
        try:
            while not http.started and not serving.done():
                await asyncio.sleep(0.005)
            on_ready()
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            await self._finish(service, http)
            await serving
        finally:
            engine.stop()
            service.encoder.shutdown(wait=False, cancel_futures=True)
        return not self._died

    def stop(self) -> None:
        """Stop gracefully; from any thread."""
        if self._loop is not None and self._stopping is not None:
            with suppress(RuntimeError):  # it has stopped already
                self._loop.call_soon_threadsafe(self._stopping.set)

    def _on_death(self) -> None:
        self._died = True
        self.stop()

    async def _finish(self, service: "Service", http: "uvicorn.Server") -> None:
        """Refuse what is new and wait for what is running, the grace period at most."""
        loop = asyncio.get_running_loop()
        service.stopping = True
        deadline = loop.time() + self.config.grace
        while service.running and loop.time() < deadline:
            await asyncio.sleep(_POLL)
        service.engine.fail_all("the server is stopping")
        http.config.timeout_graceful_shutdown = 2
        http.should_exit = True


def _warmed(engine: "Engine", catalog: "Catalog") -> "Engine":
    """The engine after a first answer, which compiles and allocates what the first client would wait for."""
    from ptst.generation.request import Request, Sampling
    from ptst.text.segments import Conversation, Message

    model = next(iter(catalog.models.values()))
    ids = model.prompt_format.encode(Conversation((Message("user", "Hello"),))).ids
    if len(ids) + 2 <= model.max_length:
        engine.run([Request(ids, Sampling(2, logprobs=True), adapter=model.adapter)])
    return engine


@contextmanager
def _no_signals():
    """uvicorn leaves signals alone."""
    yield


def serve(config: ServeConfig, catalog: "Catalog", key: str | None, listening: socket.socket) -> bool:
    """Serve until a signal. Returns whether the end was asked for."""
    server = Server(catalog, config, key, listening)
    stopped = False

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            os._exit(128 + number)
        stopped = True
        os.write(2, b"\nstopping: running answers may finish; once more ends at once\n")
        server.stop()

    async def run() -> bool:
        return await server.run(lambda: ready(server))

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ready(server: Server) -> None:
        for number in before:
            signal.signal(number, on_signal)
        host = f"[{config.host.strip('[]')}]" if ":" in config.host else config.host
        say(f"ptst.serve: listening on http://{host}:{server.port}/v1, {'with' if key else 'without'} an API key")

    try:
        return asyncio.run(run())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
