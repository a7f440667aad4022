"""Ranks watch each other: one that fails or falls silent ends the others, with its own error.

A collective operation waits for its peers for an hour (rank 0 may be sampling answers), and over nccl it cannot be
interrupted. So every rank counts in a store, from a thread of its own, and looks at the counts of the others.
"""

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from ptst.errors import UserError
from ptst.progress import console

BEAT = 1.0  # seconds between two looks
SILENT = 90.0  # seconds after which a rank is taken for dead
GRACE = 10.0  # seconds for a rank to end by itself once another has failed
_DONE = "done"


class Heartbeat:
    """This rank's thread, from `start` to `stop`. `reason`: what became of another rank, or ""."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank = store, rank
        self.others = [r for r in range(size) if r != rank]
        self.reason = ""
        self._counts: dict[int, bytes] = {}
        self._changed: dict[int, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        store.set(f"beat/{rank}", "0")

    def start(self, patience: float) -> None:
        """Wait until all ranks have come, then begin to watch. Raises UserError where one has not come in time."""
        deadline = time.monotonic() + patience
        while missing := [r for r in self.others if not self.store.check([f"beat/{r}"])]:
            if time.monotonic() > deadline:
                cause = f"rank {self.rank} waited {patience:.0f} s for {named(missing)}"
                raise UserError(cause, "see what they say; all ranks must be started together")
            time.sleep(BEAT / 10)
        self._changed = dict.fromkeys(self.others, time.monotonic())
        self._thread.start()

    def stop(self, error: str = "") -> None:
        """Leave the group, done or with an error. Waits a moment for the others to read it: the store may be rank 0's
        and end with it."""
        self._stopping.set()
        self._thread.join(timeout=2 * BEAT)
        try:
            if error:
                self.store.compare_set("failed", "", f"{self.rank} {error}")
            self.store.set(f"beat/{self.rank}", _DONE)
            deadline = time.monotonic() + 5 * BEAT
            while (error or self.rank == 0) and time.monotonic() < deadline and not self._all_know(error):
                time.sleep(BEAT / 10)
        except (dist.DistError, RuntimeError):
            pass  # the store has gone

    def why(self) -> str:
        """What became of another rank, when a connection to it has just broken: its own error if it told one."""
        deadline = time.monotonic() + 8 * BEAT
        while not self.reason and time.monotonic() < deadline:
            silent = [r for r, since in self._changed.items() if time.monotonic() - since > 5 * BEAT]
            if silent:
                return f"{named(silent)} ended without a word: killed, or its machine is gone"
            time.sleep(BEAT / 10)
        return self.reason or "the connection to another rank broke"

    def _all_know(self, error: str) -> bool:
        """Whether all others have left or, after an error, have read it."""
        for r in self.others:
            left = self.store.get(f"beat/{r}").decode() == _DONE
            if not left and not (error and self.store.check([f"read/{r}"])):
                return False
        return True

    def _watch(self) -> None:
        count = 0
        while not self.reason and not self._stopping.wait(BEAT):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                self._look()
            except (dist.DistError, RuntimeError) as error:
                self.reason = f"rank 0 or its machine is gone ({str(error).splitlines()[0]})"
        if self.reason and not self._stopping.wait(GRACE):
            console.quiet = False  # the main thread waits for the rank that has failed
            console.print(f"ptst.train: rank {self.rank}: {self.reason}", style="red", markup=False)
            os._exit(1)

    def _look(self) -> None:
        if self.store.check(["failed"]):
            rank, _, error = self.store.get("failed").decode().partition(" ")
            self.reason = f"rank {rank} failed: {error}"
            self.store.set(f"read/{self.rank}", "1")
            return
        now = time.monotonic()
        beats = self.store.multi_get([f"beat/{r}" for r in self.others]) if self.others else []
        for r, found in zip(self.others, beats, strict=True):
            if found != self._counts.get(r) or found.decode() == _DONE:
                self._counts[r], self._changed[r] = found, now
        if silent := [r for r in self.others if now - self._changed[r] > SILENT]:
            self.reason = f"{named(silent)} has given no sign for {SILENT:.0f} s: killed, or its machine is gone"


def own_connection(store: dist.Store) -> dist.Store:
    """The store by a connection of its own: one that waits for a key is blocked for all others."""
    own = store.clone()  # type: ignore[attr-defined]
    own.set_timeout(timedelta(seconds=30))
    return dist.PrefixStore("ptst", own)


def named(ranks: list[int]) -> str:
    """Ranks in words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
