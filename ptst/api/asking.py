"""Many requests to an endpoint at once; each outcome is handed over as it comes, so that it can be kept at once."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from ptst.api.endpoint import Endpoint, Trouble
from ptst.api.replies import Reply
from ptst.errors import UserError


class EndpointFailed(UserError):
    """What ended all asking: a wrong key, no credit, no such model, nobody there."""


OnOutcome = Callable[[str, Reply | Trouble], None]


def ask_all(
    endpoint: Endpoint,
    requests: Mapping[str, dict[str, Any]],
    concurrency: int,
    on_outcome: OnOutcome,
    kept: Callable[[], str],
) -> None:
    """Ask for a reply to each request, at most `concurrency` at once; `on_outcome(key, reply or trouble)` is called
    with each as it comes. Raises EndpointFailed, with what `kept` says of the replies so far, and what `on_outcome`
    raises. Ctrl-C ends it at once."""
    _run(_ask_all(endpoint, requests, concurrency, on_outcome))
    if end := endpoint.end:
        raise EndpointFailed(f"{endpoint.address.url} {end.words}", kept())


async def _ask_all(
    endpoint: Endpoint, requests: Mapping[str, dict[str, Any]], concurrency: int, on_outcome: OnOutcome
) -> None:
    """One request alone, to learn what ends them all, then many at once."""
    rest = iter(requests.items())
    kept = True

    async def work(some: Iterable[tuple[str, dict[str, Any]]]) -> None:
        nonlocal kept
        for key, request in some:
            if endpoint.end:
                return
            outcome = await endpoint.ask(request)
            if not kept:  # a disk that is full, say, which may have half a line of a file at its end
                return
            kept = False
            on_outcome(key, outcome)
            kept = True

    async with endpoint.open():
        if not endpoint.reached:
            await work(islice(rest, 1))
        await asyncio.gather(*(work(rest) for _ in range(concurrency)))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end in a thread, because a notebook's own has an event loop at work; Ctrl-C cancels it at once."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

    async def main() -> None:
        task = asyncio.ensure_future(work)
        running.append((asyncio.get_running_loop(), task))
        await task

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(asyncio.run, main())
        try:
            done.result()
        finally:
            if not done.done():
                for loop, task in running:
                    loop.call_soon_threadsafe(task.cancel)
