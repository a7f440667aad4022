"""A time limit for work of a library that cannot be interrupted."""

from collections.abc import Callable
from threading import Thread
from typing import Any


def within(seconds: float | None, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises. Raises TimeoutError after so many seconds: a thread cannot be stopped, so that it
    goes on in the background, but Ctrl-C and the end of the program do not wait for it."""
    if seconds is None:
        return work()
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append((None, error))

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError
    value, error = done[0]
    if error is not None:
        raise error
    return value
