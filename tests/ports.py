"""A port that stays free for whoever is told of it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine that nobody is given by chance meanwhile.

    One that was merely free a moment ago may be another connection's by the time a server wants it. This one is bound
    and not listened on, so that a server that sets SO_REUSEADDR, as all do, can still have it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
