"""A command in a process of its own, forked so that imports are no part of its work; its words go to a file."""

import os
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress


def run_line(words: list[str]) -> None:
    """A module and its flags, in this process, as the shell starts it."""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__")


def fork(work: Callable[[], None], log: str) -> int:
    """Start `work` in a new process; returns its id. It exits as Python would."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666), 2)
        os.dup2(2, 1)
        work()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
