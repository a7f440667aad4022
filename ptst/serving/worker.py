"""The engine in a thread of its own: requests go in by a queue, events come out in the server's event loop.

Everything that touches the engine happens in the thread, one step after the other; between steps it takes what the
queue holds and scores a batch of prompts where that is asked for. Each request, whatever becomes of it, ends in exactly
one answer.

A failure inside a step leaves the engine half updated, so all its requests are answered with an error, and a new engine
over the same weights takes its place. Where none can be made, the thread ends and the server stops.
"""

import asyncio
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ptst.errors import UserError
from ptst.generation.engine import Engine
from ptst.generation.request import Answer, Event, Request
from ptst.generation.score import Scored, check_rows, score_batches
from ptst.progress import console
from ptst.serving.errors import ApiError

FAILED = "the engine failed"
Row = tuple[list[int], list[bool]]


@dataclass(eq=False)
class Ticket:
    """A request on its way. Its events go into a queue, which it may share with others; where the request does not
    stream, that is only the last one, with the answer. `index`: its number among those it shares the queue with."""

    request: Request
    index: int
    events: "Events"
    finished: bool = False  # its answer has been put into `events`


Events = asyncio.Queue[tuple[Ticket, Event]]


@dataclass(eq=False)
class Scoring:
    """Rows of (ids, mask) to score, and where the scores go."""

    rows: Sequence[Row]
    adapter: str | None
    top_logprobs: int
    scores: asyncio.Future[list[Scored]]
    found: list[Scored] = field(default_factory=list)
    batches: Iterator[list[Scored]] | None = None


class EngineThread:
    """`make_engine` is called in the thread when an engine has failed; `on_death` in the loop when the thread ends for
    a failure. All other methods belong to the event loop's thread."""

    def __init__(self, engine: Engine, make_engine: Callable[[], Engine], on_death: Callable[[], None]):
        self._engine: Engine | None = engine  # None while a new one is made
        self._make_engine, self._on_death = make_engine, on_death
        self._config = engine.config
        self.tickets: dict[str | int, Ticket] = {}  # unfinished ones, as the event loop sees them
        self.scorings: set[Scoring] = set()
        self.alive = True
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._known: dict[str | int, Ticket] = {}  # unfinished ones, as the thread sees them
        self._to_score: deque[Scoring] = deque()
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._num_threads = torch.get_num_threads()  # each thread has its own number
        self._thread = threading.Thread(target=self._run, name="ptst engine", daemon=True)
        self._thread.start()

    # In the event loop

    def check(self, request: Request) -> None:
        """Raise UserError for a request that the engine cannot answer, ApiError where there is no engine just now."""
        engine = self._engine
        if engine is None or not self.alive:
            raise ApiError(FAILED, status=503, headers={"retry-after": "5"})
        engine.check(request)

    def submit(self, ticket: Ticket) -> None:
        """Queue a request that `check` has passed."""
        self.tickets[ticket.request.id] = ticket
        self._inbox.put(lambda: self._add(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Free what a request holds; nothing where it has ended."""
        if not ticket.finished:
            self._inbox.put(lambda: self._cancel(ticket))

    async def score(self, rows: Sequence[Row], adapter: str | None, top_logprobs: int) -> list[Scored]:
        """The scores of rows, computed between the engine's steps. Raises UserError for rows that cannot be scored,
        ApiError for a failure."""
        check_rows(self._config, rows)
        scoring = Scoring(rows, adapter, top_logprobs, self._loop.create_future())
        self.scorings.add(scoring)
        self._inbox.put(lambda: self._to_score.append(scoring))
        try:
            return await scoring.scores
        finally:
            scoring.scores.cancel()
            self.scorings.discard(scoring)

    def fail_all(self, message: str) -> None:
        """Answer all requests with an error."""
        for ticket in list(self.tickets.values()):
            self.cancel(ticket)
            self._deliver([(ticket, _failure(ticket, message))])
        for scoring in self.scorings:
            _settle(scoring, message)

    def stop(self, wait: float = 5.0) -> None:
        """End the thread after its step."""
        self._inbox.put(self._stop)
        self._thread.join(wait)

    def _deliver(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            if not ticket.finished:
                ticket.events.put_nowait((ticket, event))
                if event.answer is not None:
                    ticket.finished = True
                    self.tickets.pop(ticket.request.id, None)

    # In the thread

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while not self._stopped:
                if self._engine is None:
                    self._engine = self._make_engine()
                try:
                    self._turn(self._engine)
                except Exception:
                    self._fail()
        except Exception:
            console.print(f"ptst.serve: no new engine can be made; stopping\n{traceback.format_exc()}")
            self._send(self._die)

    def _turn(self, engine: Engine) -> None:
        """Take what has been asked, then one step."""
        if not engine.busy and not self._to_score:
            self._inbox.get()()
        while not self._stopped:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                break
        if engine.busy:
            self._tell(engine.step())
        if self._to_score:
            self._score(engine, self._to_score[0])

    def _tell(self, events: Sequence[Event]) -> None:
        told = []
        for event in events:
            ticket = self._known.get(event.id)
            if ticket is None:
                continue
            if event.answer is not None:
                del self._known[event.id]
            if ticket.request.stream or event.answer is not None:
                told.append((ticket, event))
        if told:
            self._send(lambda: self._deliver(told))

    def _add(self, ticket: Ticket) -> None:
        assert self._engine is not None
        try:
            self._engine.add(ticket.request)
            self._known[ticket.request.id] = ticket
        except UserError as error:
            told = [(ticket, _failure(ticket, str(error)))]
            self._send(lambda: self._deliver(told))

    def _cancel(self, ticket: Ticket) -> None:
        assert self._engine is not None
        self._engine.cancel(ticket.request.id)

    def _stop(self) -> None:
        self._stopped = True

    def _score(self, engine: Engine, scoring: Scoring) -> None:
        """One batch. A failure concerns nobody else: the engine's own state has no part in it."""
        if scoring.scores.done():  # nobody waits any more
            self._to_score.popleft()
            return
        if scoring.batches is None:
            scoring.batches = score_batches(
                engine.forward, scoring.rows, scoring.adapter, top_logprobs=scoring.top_logprobs
            )
        try:
            scoring.found += next(scoring.batches)
        except Exception:
            console.print(f"ptst.serve: {FAILED}\n{traceback.format_exc()}")
            self._to_score.popleft()
            self._send(lambda: _settle(scoring, FAILED))
            return
        if len(scoring.found) == len(scoring.rows):
            self._to_score.popleft()
            self._send(lambda: _settle(scoring, scoring.found))

    def _fail(self) -> None:
        """Answer all that the engine holds with an error, and let go of it."""
        console.print(f"ptst.serve: {FAILED}\n{traceback.format_exc()}")
        lost, self._known, self._engine = list(self._known.values()), {}, None
        self._send(lambda: self._deliver([(ticket, _failure(ticket, FAILED)) for ticket in lost]))
        waiting, self._to_score = list(self._to_score), deque()
        for scoring in waiting:
            self._send(partial(_settle, scoring, FAILED))

    def _die(self) -> None:
        self.alive = False
        self.fail_all(FAILED)
        self._on_death()

    def _send(self, call: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


def _failure(ticket: Ticket, message: str) -> Event:
    return Event(ticket.request.id, [], "", Answer([], "", "error", error=message))


def _settle(scoring: Scoring, found: list[Scored] | str) -> None:
    if scoring.scores.done():
        return
    if isinstance(found, str):
        scoring.scores.set_exception(ApiError(found, status=500))
    else:
        scoring.scores.set_result(found)
