"""The HTTP side: routes, limits, keys, clients that go away, and a line of log for each request.

A log line has names and numbers, never a word of a message or an answer.
"""

import asyncio
import hashlib
import hmac
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptst.progress import console, printable_json
from ptst.serving.config import ServeConfig, is_loopback
from ptst.serving.errors import ApiError, stopping
from ptst.serving.jobs import Answering, Job, chat_job, completion_job
from ptst.serving.models import Catalog
from ptst.serving.parse import parse_body, parse_chat, parse_completion
from ptst.serving.replies import sse, to_json
from ptst.serving.worker import EngineThread

Found = TypeVar("Found")
JSON = {"content-type": "application/json"}
STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
BODY_SECONDS = 60.0  # that a client may take to send its request
LAST_SECONDS = 5.0  # that a client may take to read the end of a stream


class Gone(Exception):
    """The client went away."""


class Service:
    """The application's state: models, engine, limits."""

    def __init__(self, catalog: Catalog, engine: EngineThread, config: ServeConfig, key: str | None):
        self.catalog, self.engine, self.config = catalog, engine, config
        self.key = None if key is None else hashlib.sha256(key.encode()).digest()
        self.stopping = False
        self.running: set[asyncio.Task[Any]] = set()  # requests that are being answered
        # Parsing and encoding would hold the event loop up; one thread, since tokenizers keep caches.
        self.encoder = ThreadPoolExecutor(1, "ptst encoder")

    @property
    def capacity(self) -> int:
        """Unfinished answers that there may be."""
        return self.config.batch_size + self.config.max_queue

    def admit(self, job: Job) -> Answering:
        """The job at the engine. Raises ApiError where there is no room."""
        if job.num_sequences > self.capacity:
            cause = f"the request asks for {job.num_sequences} answers, and the server takes {self.capacity} at once"
            raise ApiError(cause, "n" if job.options.n > 1 else "prompt", code="too_many_choices")
        waiting = len(self.engine.tickets) + sum(len(s.rows) for s in self.engine.scorings)
        if waiting + job.num_sequences > self.capacity:
            raise self.full(waiting)
        return Answering(job, self.engine)

    def full(self, waiting: int) -> ApiError:
        """There is no room; with a guess at when there will be."""
        headers = {"retry-after": str(min(60, 1 + waiting // self.config.batch_size))}
        return ApiError("the queue is full; try again later", status=429, code="queue_full", headers=headers)

    def check_running(self) -> None:
        """Raise ApiError where no new request is taken; a body is not even read then."""
        if self.stopping or not self.engine.alive:
            raise stopping()
        if len(self.running) > 2 * self.capacity:
            raise self.full(len(self.running))


def application(service: Service) -> ASGIApp:
    """The ASGI application."""
    routes = [
        Route("/health", health),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", show_model),
        Route("/v1/chat/completions", answer, methods=["POST"]),
        Route("/v1/completions", answer, methods=["POST"]),
    ]
    return Door(Router(routes, redirect_slashes=False), service)


async def health(request: Request) -> Response:
    """Whether requests are taken."""
    request.app.service.check_running()
    return _json({"status": "ok"})


async def list_models(request: Request) -> Response:
    """All models."""
    models = request.app.service.catalog.models.values()
    return _json({"object": "list", "data": [model.to_json() for model in models]})


async def show_model(request: Request) -> Response:
    """One model."""
    return _json(request.app.service.catalog.find(request.path_params["name"]).to_json())


async def answer(request: Request) -> Response:
    """A chat completion or a completion."""
    service: Service = request.app.service
    service.check_running()
    deadline = asyncio.get_running_loop().time() + service.config.request_timeout
    body = await read_body(request, service.config.max_body_bytes)
    is_chat = request.url.path.endswith("/chat/completions")
    running = asyncio.get_running_loop().run_in_executor(service.encoder, prepare, service, is_chat, body)
    job = request.state.job = await running
    answering = service.admit(job)
    if job.options.stream:
        return EventStream(answering, deadline)
    try:
        async with asyncio.timeout_at(deadline):
            return _json(await _unless_gone(request.receive, answering.whole()))
    except TimeoutError:
        raise _too_slow(service) from None
    finally:
        answering.close()


def prepare(service: Service, is_chat: bool, body: bytes) -> Job:
    """A body as a job. Raises ApiError."""
    catalog, most, value = service.catalog, service.config.max_new_tokens, parse_body(body)
    if is_chat:
        chat = parse_chat(value)
        return chat_job(chat, catalog.find(chat.options.model), most)
    completion = parse_completion(value)
    return completion_job(completion, catalog.find(completion.options.model), most)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request. Raises ApiError for another kind, for one that is too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of any web site could send forms and plain text to a server on this machine.
        raise ApiError("the content-type must be application/json", status=415, code="unsupported_media_type")
    too_large = ApiError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
    too_large.headers["connection"] = "close"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError("the body takes too long to arrive", status=408, code="timeout") from None
    except ClientDisconnect:
        raise Gone from None
    return bytes(body)


class EventStream(Response):
    """An answer as server-sent events, until it is finished, too late, or nobody reads it any more."""

    def __init__(self, answering: Answering, deadline: float):
        self.answering, self.deadline = answering, deadline
        self.status_code, self.background = 200, None
        self.init_headers(STREAM)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send_all(scope, send))
        finally:
            self.answering.close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        service: Service = scope["app"].service
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        chunks, last = self.answering.stream(), b""
        try:
            async with asyncio.timeout_at(self.deadline):
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (TimeoutError, ApiError) as error:
            told = error if isinstance(error, ApiError) else _too_slow(service)
            told = stopping() if service.stopping else told
            scope["state"]["error"], last = told.status, sse(told.body())
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]
            self.answering.close()
        with suppress(TimeoutError):  # a client that does not read must not keep the request for ever
            async with asyncio.timeout(LAST_SECONDS):
                await send({"type": "http.response.body", "body": last})


async def _unless_gone(receive: Receive, work: Awaitable[Found]) -> Found:
    """The result of `work`, which is cancelled when the client goes away. Raises Gone then."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class Door:
    """Around the application: who may come in, what goes wrong inside, and the log."""

    def __init__(self, router: Router, service: Service):
        self.router, self.service = router, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, length = time.monotonic(), 0, 0
        scope["app"] = self
        state = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status, length
            if message["type"] == "http.response.start":
                status = message["status"]
            length += len(message.get("body", b""))
            if length and "first" not in state:
                state["first"] = time.monotonic() - started
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self.service.running.add(task)
        try:
            await self._answer(scope, receive, sending, lambda: status == 0)
        except Gone:
            state["gone"] = True
        finally:
            self.service.running.discard(task)
            log(scope, status or 499, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, unanswered: Callable[[], bool]) -> None:
        try:
            self._check(scope)
            await self.router(scope, receive, send)
        except Gone:
            raise
        except Exception as error:
            told = self._told(error)
            scope["state"]["error"] = told.status
            if unanswered():
                await error_response(told)(scope, receive, send)

    def _told(self, error: Exception) -> ApiError:
        """What the client is told of an error; a bug is told on standard error, with its traceback."""
        if isinstance(error, HTTPException):  # of the routes
            what = {404: "there is no such path", 405: "this path takes another method"}
            headers = dict(error.headers or {})
            return ApiError(what.get(error.status_code, error.detail), status=error.status_code, headers=headers)
        if not isinstance(error, ApiError):
            console.print(f"ptst.serve: a request failed\n{traceback.format_exc()}")
            error = ApiError("the server failed", status=500)
        return stopping() if error.status == 500 and self.service.stopping else error

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a client without the key. Where none is needed, this machine's own programs are meant:
        a web page that a browser was led here by shows another name as the host's."""
        service = self.service
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if service.key is None:
            if is_loopback(service.config.host) and not _is_own(headers.get(b"host", "")):
                raise ApiError("the Host header names another machine than this one", status=403, code="wrong_host")
            return
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        matches = hmac.compare_digest(digest, service.key)  # in the same time, whatever is given
        if scope["path"] != "/health" and (kind.lower() != "bearer" or not matches):
            cause = "no API key, or a wrong one: send the header Authorization: Bearer KEY"
            headers_out = {"www-authenticate": "Bearer"}
            raise ApiError(cause, status=401, code="invalid_api_key", headers=headers_out)


def _is_own(host: str) -> bool:
    """Whether a Host header names this machine by a loopback address."""
    name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
    return is_loopback(name)


def log(scope: Scope, status: int, seconds: float) -> None:
    """One line of JSON on standard error."""
    state = scope["state"]
    job: Job | None = state.get("job")
    line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "method": scope["method"]}
    endpoint = scope.get("endpoint")  # of unknown paths, not even the name is kept
    line |= {
        "path": scope["path"] if endpoint not in (None, show_model) else None,
        "status": state.get("error", status),
    }
    if job is not None:
        usage = job.usage
        line |= {"model": job.model.name, "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
        line |= {"completion_tokens": usage.completion_tokens, "stream": job.options.stream}
    if "first" in state:
        line["first_byte_seconds"] = round(state["first"], 4)
    if state.get("gone"):
        line["client"] = "gone"
    with suppress(OSError, ValueError):  # nobody may be there to read it
        print(printable_json({**line, "seconds": round(seconds, 4)}), file=sys.stderr, flush=True)


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's form."""
    return Response(to_json(error.body()), error.status, {**JSON, **error.headers})


def _json(value: Any) -> Response:
    return Response(to_json(value), 200, JSON)


def _too_slow(service: Service) -> ApiError:
    seconds = service.config.request_timeout
    return ApiError(f"the request took longer than {seconds:g} seconds", status=504, code="timeout")
