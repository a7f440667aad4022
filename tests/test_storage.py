"""Files that are whole or absent, and locks that lock: also where the disk is shared, and where it has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from pathlib import Path

import pytest
import torch

from ptst import runs, storage
from ptst.errors import UserError
from ptst.evaluation.answers import AnswerFile, Asked
from ptst.generation.request import Answer, Sampling
from ptst.model.weights import save_safetensors
from tests.test_runs import a_record

ASKED = Asked([[1, 2]], Sampling(4))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_safetensors(tmp_path / "weights.safetensors", {"w": torch.zeros(3)})
        storage.write_json(tmp_path / "run.json", {})
        storage.append_jsonl(tmp_path / "metrics.jsonl", {})
    finally:
        os.umask(before)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_partial_names_never_meet(tmp_path, monkeypatch):
    """Two hosts that share a disk may have the same process ids, and one process may write a file twice at once."""
    here = storage.partial_path(tmp_path / "run.json")
    assert f".{socket.gethostname()}.{os.getpid()}." in here.name
    assert storage.partial_path(tmp_path / "run.json") != here
    monkeypatch.setattr(socket, "gethostname", lambda: "other/host" + "x" * 300)
    there = storage.partial_path(tmp_path / "run.json")
    assert there.parent == tmp_path and ".other-host" in there.name and len(there.name) < 200
    with pytest.raises(ZeroDivisionError), storage.atomic_path(tmp_path / "a") as one, storage.atomic_path(one) as two:
        assert one.exists() and two.exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_partial_files_are_removed_wherever_a_run_writes(tmp_path):
    out = tmp_path / "run"
    for name in (".", "epoch-0.5", "best", "state", "state/.step-00000001.x.partial", "eval/a"):
        (out / name).mkdir(parents=True)
        storage.partial_path(out / name / "model.safetensors").write_text("half")
    a_record().write(out)
    with runs.claim(out, a_record()):
        left = sorted(str(p.parent.relative_to(out)) for p in out.rglob(".model.*"))
    # The checkpoints remove theirs whole; an evaluation of the weights of an epoch holds a folder of its own.
    assert left == ["eval/a", "state/.step-00000001.x.partial"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "run.json", "state/step-00000001", "best", ".lock"])
def test_a_link_in_a_run_folder_is_refused_and_its_target_left_alone(tmp_path, name):
    out, mine = tmp_path / "run", tmp_path / "mine"
    (out / "state").mkdir(parents=True)
    a_record().write(out)
    mine.write_text(json.dumps(a_record().to_json()))
    kept = mine.read_bytes()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(mine)
    with (
        pytest.raises(UserError, match=rf"{name} is a symbolic link to .*mine.*; remove it"),
        runs.claim(out, a_record()),
    ):
        pass
    assert mine.read_bytes() == kept


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("a\nb")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "mine")
    writes = (
        lambda: storage.append_jsonl(link, {}),
        lambda: storage.write_json(link, {}),
        lambda: save_safetensors(link, {"w": torch.zeros(1)}),
        lambda: storage.lock(tmp_path, "link").__enter__(),
        lambda: AnswerFile(link, ASKED),
    )
    for write in writes:
        with pytest.raises(UserError, match="is a symbolic link"):
            write()
    assert link.is_symlink() and (tmp_path / "mine").read_text() == "a\nb"
    AnswerFile(tmp_path / "answers.jsonl", ASKED).add(0, Answer([1], "a", "stop"))
    assert AnswerFile(tmp_path / "answers.jsonl", ASKED).known


def test_a_lock_is_a_file_open_for_writing(tmp_path, monkeypatch):
    """NFS makes record locks of it, which need such a handle and know no folders."""
    flock, seen = fcntl.flock, []

    def watched(handle, operation):
        seen.append((stat.S_ISREG(os.fstat(handle).st_mode), fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
        return flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", watched)
    with storage.exclusive_lock(tmp_path), storage.lock(tmp_path / "locks", "a") as mine:
        assert mine
    assert set(seen) == {(True, os.O_RDWR)}
    with storage.exclusive_lock(tmp_path):  # the one before was released
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch, number):
    def absent(_handle, _operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", absent)
    for take in (storage.exclusive_lock(tmp_path), storage.lock(tmp_path, "a"), storage.lock(tmp_path, "a", wait=True)):
        with (
            pytest.raises(UserError, match=rf"cannot be locked \({os.strerror(number)}\); use a folder on a disk"),
            take,
        ):
            pytest.fail("not locked")


def test_a_disk_that_ignores_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda _handle, _operation: None)
    for take in (storage.exclusive_lock(tmp_path), storage.lock(tmp_path, "a")):
        with (
            pytest.raises(UserError, match=r"locks in .* have no effect: two processes could .*; use a folder on"),
            take,
        ):
            pytest.fail("not locked")
    with pytest.raises(UserError, match="have no effect"), runs.claim(tmp_path / "run", a_record()):
        pytest.fail("not locked")
    monkeypatch.undo()
    with runs.claim(tmp_path / "run", a_record()) as run:  # what the refusal left is no earlier run
        assert not run.resumed


def test_names_that_are_not_utf8_survive_json(tmp_path):
    name = os.fsdecode(b"data-\xff.jsonl")
    storage.write_json(tmp_path / "a.json", {"data": name})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"data": name}


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    """A system's error of writing names no file by itself."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        storage.append_jsonl(Path("/dev/full"), {"step": 1})

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*run\.json"):
        storage.write_json(tmp_path / "run.json", {})
    assert not [*tmp_path.iterdir()]
