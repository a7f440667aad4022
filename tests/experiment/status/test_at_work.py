"""Who is at work in a folder: found without a lock, whatever workers left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ptst.experiment.status import at_work
from ptst.experiment.status.at_work import Note, WorkerFile, held_names, holder, host, read_notes, remove_dead_notes
from ptst.experiment.status.items import Item, add_items, by_name
from ptst.experiment.status.watch import Part, Watch
from ptst.storage import LOCK, exclusive_lock, lock

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock of a cell."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "run.other").touch()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, tmp_path / "locks" / "cell.a.seed0.vanilla.safety"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="the system does not tell which locks are held")
def test_who_holds_a_lock_is_seen_until_the_process_is_killed(held, tmp_path):
    add_items(tmp_path, by_name([Item("test", "a.seed0/vanilla.safety"), Item("train", "other")]))
    assert held_names(tmp_path) == {"cell.a.seed0.vanilla.safety": held.pid}
    standing = Watch([Part(tmp_path)]).look()
    assert {what: busy.pid for what, busy in standing.running.items()} == {"test a.seed0/vanilla.safety": held.pid}
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert held_names(tmp_path) == {} and Watch([Part(tmp_path)]).look().workers == ()


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="the system does not tell which locks are held")
def test_looking_takes_no_lock(tmp_path, monkeypatch):
    """A worker that tries a lock at the same moment gets it."""
    (tmp_path / LOCK).touch()

    def never(*_args):
        raise AssertionError("a lock was tried")

    with lock(tmp_path / "locks", "cell.a"):
        monkeypatch.setattr(at_work.json, "dumps", never)  # nor is anything written
        monkeypatch.setattr("fcntl.flock", never)
        assert held_names(tmp_path) == {"cell.a": os.getpid()}
        assert holder(tmp_path) is None
        assert Watch([Part(tmp_path)]).look().finished == frozenset()
    monkeypatch.undo()
    with exclusive_lock(tmp_path):
        assert holder(tmp_path) == os.getpid()


def test_where_the_system_does_not_tell_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(at_work, "holders", lambda _paths: None)
    assert Watch([Part(tmp_path)]).look().workers is None


def test_a_worker_says_what_it_does(tmp_path):
    add_items(tmp_path, by_name([Item("train", "a"), Item("train", "b")]))
    with WorkerFile(tmp_path) as file:
        with file.busy(["train a"]):
            file.tell("train 3/15")
            (note,) = read_notes(tmp_path)
            assert note.alive and note.doing == ["train a"] and note.who == f"process {os.getpid()}"
            file.fail("train b", "is not to be")
        standing = Watch([Part(tmp_path)]).look()
        assert standing.failed == {"train b": "is not to be"} and standing.left == ["train a"]
    (note,) = read_notes(tmp_path)  # it failed, so that its note stays
    assert note.ended and not note.alive
    with WorkerFile(tmp_path):
        pass
    assert read_notes(tmp_path) == []


def test_a_note_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_paths):
        raise OSError(28, "No space left on device")

    with WorkerFile(tmp_path) as mine:
        monkeypatch.setattr(os, "replace", full)
        mine.fail("a cell", "an error")
        assert [path.name for path in mine.path.parent.iterdir()] == [mine.path.name]


def test_notes_of_the_dead_the_silent_and_the_damaged(tmp_path):
    folder = tmp_path / "workers"
    folder.mkdir()
    here, there = Note(pid=2**22 + 1, started=5), Note(host="elsewhere", pid=7, started=5)
    for name, note in (("here", here), ("there", there)):
        (folder / f"{name}.json").write_text(json.dumps(vars(note)))
    (folder / "broken.json").write_text('{"host": ')
    (folder / "other.json").write_text("[1]")
    assert {note.who: note.alive for note in read_notes(tmp_path)} == {
        f"process {here.pid}": False,
        "process 7 on elsewhere": True,
    }
    old = time.time() - 2 * at_work.SILENT
    os.utime(folder / "there.json", (old, old))
    assert not any(note.alive for note in read_notes(tmp_path))
    with WorkerFile(tmp_path):  # removes what a killed process of this machine left
        assert not (folder / "here.json").exists() and (folder / "there.json").exists()


def test_half_written_notes_of_the_dead_are_removed(tmp_path):
    folder = tmp_path / "workers"
    folder.mkdir()
    alive, elsewhere = (f".{host()}.{os.getpid()}.json.partial", f".not-{host()}.7.json.partial")
    for name in (alive, elsewhere, f".{host()}.{2**22 + 1}.json.partial"):
        (folder / name).touch()
    remove_dead_notes(tmp_path)
    assert {path.name for path in folder.iterdir()} == {alive, elsewhere}
