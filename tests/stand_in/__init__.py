"""A stand-in for OpenAI's API: real HTTP on loopback, with files, fine-tuning jobs, chats, completions and faults.

    with StandIn(faults=[Fault(429, path="/chat/completions", numbers={0, 3})]) as server:
        client = OpenAI(base_url=server.url, api_key=server.key)

`python -m tests.stand_in --port 0` is the same as a process of its own, for tests that kill its client. In both cases
files and jobs live in the server, so that they survive any client.
"""

from tests.stand_in.faults import Fault
from tests.stand_in.jobs import JobScript
from tests.stand_in.server import KEY, Request, StandIn

__all__ = ["KEY", "Fault", "JobScript", "Request", "StandIn"]
