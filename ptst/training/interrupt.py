"""Ctrl-C, SIGTERM and SIGHUP during training: the step is finished and saved first."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from ptst.training.parallel import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal came; the step was finished and saved. `exit_code` is the shell's: 128 + the signal."""

    def __init__(self, step: int, number: int, out: Path):
        super().__init__(f"stopped after step {step}, which is saved")
        self.out = out
        self.exit_code = 128 + number


class Interrupt:
    """A context that takes note of the first signal, and says so at once; a later one kills as usual, but for SIGHUP: a
    terminal that is closed sends several. Signals that were ignored (nohup) still are."""

    def __init__(self, world: "World") -> None:
        self.world, self.received = world, 0

    def __enter__(self) -> Self:
        # Only a main thread may set handlers.
        main = threading.current_thread() is threading.main_thread()
        heard = [s for s in SIGNALS if main and signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in heard}
        self._voice = _Voice() if heard and self.world.is_main_process else None
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        voice, self._voice = self._voice, None
        if voice is not None:
            voice.end()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _tell(b"")

    def agreed(self) -> int:
        """The signal that any rank got, or 0; the same on all ranks (all must call)."""
        if not self.world.sum(self.received):
            return 0
        counts = [int(self.world.sum(self.received == number)) for number in SIGNALS]
        return next(s for s, n in zip(SIGNALS, counts, strict=True) if n)


class _Voice:
    """A thread that says at once that a signal came. Python runs a handler only when the main thread is back from
    whatever it computes or waits for, which on a GPU can be the whole step."""

    def __init__(self) -> None:
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while heard := os.read(self._ear, 1):
            if heard[0] in SIGNALS:
                _tell(b"\nstopping after this step, which is saved first; press Ctrl-C again to stop now\n")
                return

    def end(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._mouth)
        self._thread.join()
        os.close(self._ear)


def _tell(message: bytes) -> None:
    """Written directly: the main thread may be inside a print. Where the terminal has gone, all later words go nowhere,
    so that none of them ends the run before it is saved."""
    for stream, text in ((2, message), (1, b"")):
        try:
            os.write(stream, text)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
