"""Work on many pieces by several processes of this one's making, its results in order.

The processes are forked, so that they have all that this one has read (a tokenizer, rows) without a copy being sent.
What they send back are bytes; nothing is unpickled. Each process takes every n-th piece and waits until its result is
taken, so that no more than two results for each process are in memory.
"""

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from ptst.errors import UserError

_GOOD, _FAILED = b"+", b"-"
MOST = 32  # processes
_PARALLEL = "TOKENIZERS_PARALLELISM"  # of the tokenizers' library, whose threads do not survive a fork


def num_processes() -> int:
    """How many processes this machine has cores for, as far as this one may use them."""
    return min(MOST, len(os.sched_getaffinity(0)))


def forked_map(work: Callable[[int], bytes], count: int, processes: int | None = None) -> Iterator[bytes]:
    """`work` of 0, 1, ... up to `count`, in order. Raises RuntimeError, with its traceback, for an error in a process,
    and UserError where one is killed. One process, or one piece, is computed here."""
    size = min(num_processes() if processes is None else processes, count)
    if size <= 1:
        yield from map(work, range(count))
        return
    with _started(work, count, size) as pipes:
        for number in range(count):
            yield _receive(pipes[number % size][0], pipes[number % size][1])


@contextmanager
def _started(work: Callable[[int], bytes], count: int, size: int) -> Iterator[list[tuple[Connection, BaseProcess]]]:
    context, started = get_context("fork"), list[tuple[Connection, BaseProcess]]()
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"  # read in the child as it begins, before any code of ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the children use none
            for first in range(size):
                ours, theirs = context.Pipe(duplex=False)
                others = [pipe for pipe, _ in started]
                given = (work, range(first, count, size), theirs, [ours, *others])
                process: BaseProcess = context.Process(target=_run, args=given, daemon=True)
                process.start()
                theirs.close()
                started.append((ours, process))
        yield started
    finally:
        if before is None:
            os.environ.pop(_PARALLEL, None)
        else:
            os.environ[_PARALLEL] = before
        for pipe, process in started:
            pipe.close()
            process.kill()
            process.join()


def _run(work: Callable[[int], bytes], numbers: range, pipe: Connection, others: list[Connection]) -> None:
    """In a process: its pieces one after another."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)  # the handlers are the first process's
    for other in others:
        other.close()
    with suppress(BrokenPipeError):
        try:
            for number in numbers:
                pipe.send_bytes(_GOOD + work(number))
        except BrokenPipeError:
            raise
        except BaseException:
            pipe.send_bytes(_FAILED + traceback.format_exc().encode(errors="replace"))
    pipe.close()


def _receive(pipe: Connection, process: BaseProcess) -> bytes:
    try:
        found = pipe.recv_bytes()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # as the system does where memory is short
            remedy = "see whether memory is short (dmesg), and run this again"
            raise UserError("one of the processes that encode or check rows was killed", remedy) from None
        raise RuntimeError(f"a process of this one ended early, with exit code {process.exitcode}") from None
    if found[:1] == _FAILED:
        raise RuntimeError(f"in a process of this one:\n{found[1:].decode()}")
    return found[1:]
