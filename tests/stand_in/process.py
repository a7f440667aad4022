"""The stand-in as a process of its own, which outlives the clients that a test kills."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stand_in.faults import Fault
from tests.stand_in.server import KEY


@dataclass
class Process:
    """What it was asked, and what it has: `requests`, `files` and `jobs` as JSON has them."""

    url: str
    key: str = KEY

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self._ask("requests")

    @property
    def files(self) -> list[dict[str, Any]]:
        return self._ask("files")

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return self._ask("jobs")

    def set_faults(self, *faults: Fault) -> None:
        self._ask("faults", json.dumps([fault.to_json() for fault in faults]).encode())

    def _ask(self, what: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/stand-in/{what}", data, timeout=120) as answer:
            return json.load(answer)


@contextmanager
def stand_in_process(*flags: str) -> Iterator[Process]:
    """Start it with the flags of `python -m tests.stand_in`, and end it."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.stand_in", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            yield Process(process.stdout.readline().strip())
        finally:
            process.kill()
