"""How many CPU threads to compute with: as asked, or as many as are fastest with what else the machine is doing.

Results are the same to the bit for the same number of threads. The compiled loops (ptst.kernels.cpu) split their work
by torch's number, too.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from ptst.errors import UserError
from ptst.progress import say
from ptst.records import FILE, read_json

SECONDS = 0.25  # of measuring, but for the last product
ROUNDS = 2
GAIN = 1.1  # more threads must be faster by this factor
SIZE = 512  # of the matrices


def choose_threads(asked: int | None, folder: Path | None = None) -> None:
    """The number of threads of a command: `asked`, OMP_NUM_THREADS if it is set, that of the unfinished run in
    `folder`, or what is measured. On a GPU torch's own number serves."""
    recorded = _recorded(folder)
    resume_threads(asked, recorded)
    if asked is None and not os.environ.get("OMP_NUM_THREADS") and not recorded and not torch.cuda.is_available():
        most = torch.get_num_threads()
        torch.set_num_threads(number := fastest(most))
        if number < most:
            say(f"computing with {number} of {most} threads, which is faster just now (--threads)")


def resume_threads(asked: int | None, recorded: Mapping[str, Any] | None) -> None:
    """The number of threads of a run that is resumed: `asked`, OMP_NUM_THREADS if it is set, or that of its record's
    `environment`; without a record only what is asked for is set."""
    if asked is not None:
        torch.set_num_threads(asked)
    elif not os.environ.get("OMP_NUM_THREADS") and isinstance(number := (recorded or {}).get("threads"), int):
        torch.set_num_threads(number)


@contextmanager
def threads_restored() -> Iterator[None]:
    """After it, the number of threads is what it was before."""
    number = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(number)


def fastest(most: int, seconds: float = SECONDS) -> int:
    """The number of threads, `most` or a half, a quarter, ... of it, that multiplies matrices fastest; the smaller one
    where two are about as fast. Measures for `seconds`, in turns, since the load changes."""
    numbers = [most >> i for i in range(most.bit_length())]
    if len(numbers) == 1:
        return most
    products, spent = dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0.0)
    start = last = time.perf_counter()
    with threads_restored(), torch.inference_mode():
        for i, number in enumerate(ROUNDS * numbers, 1):
            torch.set_num_threads(number)
            products[number] += _multiply(start + seconds * i / (ROUNDS * len(numbers)))
            now = time.perf_counter()
            spent[number] += now - last
            last = now
    best = numbers[-1]
    for number in reversed(numbers):
        if products[number] / spent[number] > GAIN * products[best] / spent[best]:
            best = number
    return best


def _multiply(until: float) -> int:
    """The number of products that are made until then, at least one."""
    a, done = torch.ones(SIZE, SIZE), 0
    while not done or time.perf_counter() < until:
        a @ a
        done += 1
    return done


class SlowDown:
    """Notices that steps on a CPU take much longer than earlier ones of about as many tokens, and says so once: other
    work on the machine then makes several threads wait for each other."""

    FACTOR = 3.0
    LEAST = 1.0  # seconds that are looked at together: shorter ones vary by chance
    BEFORE = 3  # steps that are needed to compare with
    told: ClassVar[bool] = False

    def __init__(self) -> None:
        self._before: dict[int, deque[float]] = {}  # seconds of steps, by the logarithm of their tokens
        self._seconds = self._expected = 0.0

    def took(self, device: torch.device, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long; on a GPU it is nobody else's."""
        if device.type == "cpu":
            self.step(tokens, seconds)

    @contextmanager
    def watch(self, device: torch.device, tokens: int) -> Iterator[None]:
        """What is inside is such a step."""
        began = time.perf_counter()
        yield
        self.took(device, tokens, time.perf_counter() - began)

    def step(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if tokens <= 0 or SlowDown.told:
            return
        before = self._before.setdefault(round(2 * math.log2(tokens)), deque(maxlen=100))
        if len(before) >= self.BEFORE:
            self._seconds += seconds
            self._expected += median(before)
        before.append(seconds)
        if self._seconds >= self.LEAST:
            if self._seconds > self.FACTOR * self._expected:
                SlowDown.told = True
                self._say(self._seconds / self._expected)
            self._seconds = self._expected = 0.0

    def _say(self, factor: float) -> None:
        number = torch.get_num_threads()
        remedy = "stop and resume with fewer threads, --threads 1" if number > 1 else "let it end first"
        say(f"note: steps take {factor:.1f} times as long as before; if other work keeps the machine busy, {remedy}")


def _recorded(folder: Path | None) -> Mapping[str, Any] | None:
    """The environment of the unfinished run in a folder, if there is one."""
    try:
        values = read_json(folder / FILE) if folder is not None else None
    except (OSError, UserError):
        return None  # whoever opens the run says what is wrong with it
    if not isinstance(values, dict) or values.get("status") != "running":
        return None
    return values["environment"] if isinstance(values.get("environment"), dict) else None
