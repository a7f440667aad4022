"""Where each host keeps its own locks on a disk that hosts share, one host at a time is at work in a folder."""

from __future__ import annotations

import json

import pytest

from ptst import host_claims, runs, storage
from ptst.errors import UserError
from tests.test_runs import a_record

ROOT = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"


def mounted(monkeypatch, folder, kind: str, options: str = "rw") -> None:
    """The folder is the root of a file system of this kind."""
    point = str(folder).replace("\\", "\\134").replace(" ", "\\040")
    mounts = folder.parent / "mountinfo"
    mounts.write_text(f"{ROOT}23 22 0:40 / {point} rw,relatime - {kind} server:/home {options}\n")
    monkeypatch.setattr(host_claims, "MOUNTS", mounts)


@pytest.mark.parametrize(
    ("kind", "options", "ends"),
    [
        ("ext4", "rw", False),
        ("nfs4", "rw,vers=4.2,local_lock=none", False),
        ("nfs", "rw,vers=3,nolock,local_lock=all", True),
        ("nfs", "rw,vers=3,local_lock=flock", True),
        ("lustre", "rw,flock", False),
        ("lustre", "rw,localflock", True),
        ("cifs", "rw,nobrl", True),
        ("cifs", "rw", False),
        ("fuse.sshfs", "rw", True),
        ("fuse.glusterfs", "rw", False),
        ("beegfs", "rw", True),
    ],
)
def test_where_locks_end(tmp_path, monkeypatch, kind, options, ends):
    folder = tmp_path / "a disk"
    folder.mkdir()
    mounted(monkeypatch, folder, kind, options)
    assert host_claims.locks_end_at_host(folder / "runs" / "a") == ends
    assert not host_claims.locks_end_at_host(tmp_path)  # on the root's


def test_a_system_that_does_not_tell_its_mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(host_claims, "MOUNTS", tmp_path / "none")
    assert not host_claims.locks_end_at_host(tmp_path)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder on such a disk; `shared.other()` is what another host left or holds there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(monkeypatch, folder, "fuse.sshfs")
    return folder


def by_another(path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "node7", "boot": "x"}))


def test_another_hosts_run_is_left_alone(shared):
    by_another(shared / ".lock.host")
    with (
        pytest.raises(UserError, match=r"in use by node7 \(locks .* do not reach it; if nothing runs there, remove .*"),
        storage.exclusive_lock(shared),
    ):
        pass
    assert json.loads((shared / ".lock.host").read_text())["host"] == "node7"
    (shared / ".lock.host").unlink()
    with storage.exclusive_lock(shared):
        assert (shared / ".lock.host").exists()
        with pytest.raises(UserError, match="in use by another process"), storage.exclusive_lock(shared):
            pass
    assert not (shared / ".lock.host").exists()


def test_a_claim_of_this_host_whose_process_was_killed_is_taken_over(shared):
    own = {"host": "me", "boot": host_claims._boot()}
    (shared / ".lock.host").write_text(json.dumps(own))
    with runs.claim(shared, a_record()):  # the file is no earlier run
        pass
    assert not (shared / ".lock.host").exists()


def test_work_that_another_host_has_is_left_to_it(shared, capsys, monkeypatch):
    by_another(shared / "locks" / "cell.a.host")
    for _ in range(2):
        with storage.lock(shared / "locks", "cell.a") as mine, storage.lock(shared / "locks", "cell.b") as other:
            assert not mine and other
    assert capsys.readouterr().err.count("note: cell.a is in use by node7") == 1
    monkeypatch.setattr(storage, "CLAIMED", 0.0)
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: None)
    with (
        pytest.raises(UserError, match=r"cell\.a is in use by node7"),
        storage.lock(shared / "locks", "cell.a", wait=True),
    ):
        pass


def test_waiting_for_another_host(shared, monkeypatch):
    by_another(shared / "locks" / "record.host")
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: (shared / "locks" / "record.host").unlink())
    with storage.lock(shared / "locks", "record", wait=True) as mine:
        assert mine


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_claim_is_anothers(shared, content):
    (shared / ".lock.host").write_text(content)
    with pytest.raises(UserError, match="in use by another host"), storage.exclusive_lock(shared):
        pass
