"""The stand-in as a process of its own: `python -m tests.stand_in --port 0` prints its URL and serves until killed."""

from __future__ import annotations

import argparse
import threading

from tests.stand_in.jobs import JobScript
from tests.stand_in.server import KEY, StandIn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default=KEY)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--tick", type=float, default=JobScript.tick, help="seconds of a job's step")
    parser.add_argument("--steps", type=int, default=JobScript.steps, help="steps of a job, at most")
    given = parser.parse_args()
    job = JobScript(given.tick, given.steps)
    with StandIn(key=given.key, latency=given.latency, port=given.port, job=job) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
