"""Ctrl-C while a command's modules are imported ends it quietly. Importing this module first of all makes it so; a
program that has its own `sys.excepthook` keeps it.
"""

import os
import signal
import sys
from types import TracebackType


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        os.write(2, b"\nstopped\n")
        os._exit(128 + signal.SIGINT)
    sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _quiet
