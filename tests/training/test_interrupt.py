"""Signals during training: noted, acknowledged at once, and only a later one stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest

from ptst.training.interrupt import SIGNALS, Interrupt
from ptst.training.parallel import ALONE, World
from tests.conftest import ROOT

WORD = "stopping after this step, which is saved first; press Ctrl-C again to stop now"


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_a_second_one_stops(number, capfd):
    stopped = []
    before = signal.signal(number, lambda *_: stopped.append(number))
    try:
        with Interrupt(ALONE) as noted:
            assert noted.agreed() == 0
            signal.raise_signal(number)
            assert noted.agreed() == noted.received == number and not stopped
            assert WORD in capfd.readouterr().err
            signal.raise_signal(number)
            assert stopped == [number] * (number != signal.SIGHUP)  # a closed terminal sends it twice
        stopped.clear()
        signal.raise_signal(number)
        assert stopped == [number]
    finally:
        signal.signal(number, before)
    assert WORD not in capfd.readouterr().err


def test_the_word_does_not_wait_for_the_main_thread():
    """Python runs no handler while C code computes, or waits for a device."""
    code = """
import hashlib, os, signal, threading
from ptst.training.interrupt import Interrupt
class ALONE: is_main_process = True
with Interrupt(ALONE) as noted:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
    os.write(2, b"computed " + str(noted.received).encode())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == f"\n{WORD}\ncomputed 15"


def test_what_is_ignored_stays_ignored():
    """nohup starts a command so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(ALONE) as noted:
            signal.raise_signal(signal.SIGHUP)
            assert noted.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_heard():
    def use() -> None:
        with Interrupt(ALONE) as noted:
            heard.append(noted.agreed())

    heard: list[int] = []
    threads = threading.active_count()
    (thread := threading.Thread(target=use)).start()
    thread.join()
    assert heard == [0] and threading.active_count() == threads


@dataclass(frozen=True)
class Two(World):
    """Two ranks, of which the other one got `signal`."""

    size: int = 2
    signal: int = 0
    asked: list[float] = field(default_factory=list)

    def sum(self, value: float) -> float:
        self.asked.append(value)
        return value + [self.signal, *(number == self.signal for number in SIGNALS)][len(self.asked) - 1]


def test_ranks_agree_on_a_signal():
    with Interrupt(Two(signal=signal.SIGHUP)) as noted:
        assert noted.agreed() == signal.SIGHUP and noted.received == 0
    with Interrupt(world := Two()) as noted:
        assert noted.agreed() == 0 and len(world.asked) == 1  # one number in each step


def test_a_closed_terminal_does_not_end_the_run_before_it_is_saved(tmp_path):
    """SIGHUP comes when there is nobody left to read: every word fails then."""
    code = f"""
import os, signal
from ptst.progress import say
from ptst.training.interrupt import Interrupt
class ALONE: is_main_process = True
with Interrupt(ALONE) as noted:
    input()
    signal.raise_signal(signal.SIGHUP)
    say("a step"), print("a result", flush=True)
    open({str(tmp_path / "saved")!r}, "w").write(str(noted.received))
"""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, text=True
    )
    os.close(theirs)
    os.close(ours)  # the terminal's window
    process.communicate("go on\n")
    assert process.returncode == 0 and (tmp_path / "saved").read_text() == "1"
