"""Ctrl-C and SIGTERM during training: the step is finished and saved first."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

from ptst.training.parallel import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal came; the step was finished and saved. `exit_code` is the shell's: 128 + the signal."""

    def __init__(self, step: int, number: int, out: Path):
        super().__init__(f"stopped after step {step}, which is saved")
        self.out = out
        self.exit_code = 128 + number


class Interrupt:
    """A context that takes note of the first signal, and says so; a second one kills as usual."""

    def __init__(self, world: World) -> None:
        self.world, self.received = world, 0

    def __enter__(self) -> Self:
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
        if self.world.is_main_process:  # written directly: a handler may run inside a print
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop now\n")

    def agreed(self) -> int:
        """The signal that any rank got, or 0; the same on all ranks (all must call)."""
        counts = [int(self.world.sum(self.received == number)) for number in SIGNALS]
        return next((s for s, n in zip(SIGNALS, counts, strict=True) if n), 0)
