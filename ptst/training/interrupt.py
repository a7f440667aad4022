"""Ctrl-C and SIGTERM while training: the step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from ptst.training.parallel import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, notes the first signal in place of dying from it; a second one kills as usual."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Interrupt:
        # Only a main thread may set handlers.
        main = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS} if main else {}
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def agreed(self, world: World) -> int:
        """The signal that any rank got, or 0; the same on all ranks (all must call)."""
        got = [int(world.sum(self.received == number)) for number in SIGNALS] if world.size > 1 else []
        return next((s for s, n in zip(SIGNALS, got, strict=True) if n), 0) if got else self.received
