"""Files that are whole or absent (temporary name, fsync, rename), rows added to a file, and locks between processes.

Nothing is written through a symbolic link: a folder that somebody else made could hold one to a file of yours.
"""

import fcntl
import glob
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError
from ptst.host_claims import SUFFIX, claim, locks_end_at_host
from ptst.progress import say_once

LOCK = ".lock"  # the file in a run folder that the process at work in it has locked
CLAIM = f"{LOCK}{SUFFIX}"  # of its host, where locks of the disk end there
LOCKS = "locks"  # the folder of a shared folder's locks
CLAIMED = 600.0  # seconds to wait for another host
_ANOTHER = "another process"
_WITH_LOCKS = "use a folder on a disk with working locks: a local one, or NFS or Lustre mounted with locking"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` on a normal exit and is removed on an error. A kill at any
    instant leaves the old file or the new one. The file is as readable as any new one, whatever wrote it. Raises
    UserError where `path` is a symbolic link."""
    refuse_link(path)
    partial = partial_path(path)
    try:
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield partial
        os.chmod(partial, mode)  # safetensors makes files that only their owner can read
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A temporary name beside `path` that no other process has, on this host or on another that shares the disk."""
    host = socket.gethostname().replace("/", "-")[:64]
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def refuse_link(path: Path) -> None:
    """Raise UserError where a symbolic link is in the place of something that is to be written."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link to {os.readlink(path)}, which would be overwritten", "remove it")


def refuse_links(folder: Path) -> None:
    """Raise UserError for a symbolic link in a run folder, or in a folder in it."""
    for path in _children(folder):
        refuse_link(path)


def write_atomically(path: Path, data: bytes) -> None:
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # a file's name may be no UTF-8: JSON's own escape


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSONL file; `sync` makes sure that it is on the disk. Raises UserError for a symbolic link."""
    refuse_link(path)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _named(error, path) from None


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file's name: a full disk is known when a file is written, which has none by itself."""
    if error.filename is None and error.errno is not None:
        error.filename = str(path)
    return error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_home() -> Path:
    """The user's folder for what ptst keeps between runs: `$PTST_HOME`, by default `~/.cache/ptst`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ptst")
    return Path(os.environ.get("PTST_HOME") or cache).expanduser().absolute()


def remove_partial_files(folder: Path) -> None:
    """Remove the half-written files that a kill left in a run folder and in the folders in it (epoch-0.5, best). The
    caller holds the folder, so that nobody is writing them."""
    for path in _children(folder):
        if path.match(".*.partial") and (path.is_symlink() or not path.is_dir()):
            with suppress(OSError):  # it only takes space
                path.unlink()


def remove_partial_files_of(*paths: Path) -> None:
    """The same for single files in a folder on which several processes work. The caller holds the lock of these."""
    for path in paths:
        for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            partial.unlink(missing_ok=True)


def _children(folder: Path) -> Iterator[Path]:
    """What is in a folder and in the folders in it, links not followed."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from sorted(path.iterdir())


@contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """Hold a run folder. Raises UserError where another process does, and where locks do not work there; the lock of a
    killed process is released."""
    with _lock(out / LOCK) as other:
        if other:
            raise UserError(f"{out} is in use by {other}", ("wait for it, or choose another ", Setting("out")))
        yield


@contextmanager
def lock(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process got the lock of that name, a file in `folder`. `wait`: until it has. Raises UserError where
    locks do not work there, and where a host that they do not reach has it for longer than CLAIMED."""
    folder.mkdir(parents=True, exist_ok=True)
    path, since = folder / name.replace("/", "."), time.monotonic()
    while True:
        with _lock(path, wait) as other:
            if not (other and wait):
                if other not in ("", _ANOTHER):
                    say_once(f"note: {path.name} is in use by {other}")
                yield not other
                return
        if time.monotonic() - since > CLAIMED:
            raise UserError(f"{path} is in use by {other}")
        time.sleep(1.0)


@contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[str]:
    """The lock of a file, opened for writing (NFS locks neither folders nor files that are only read): "", or who has
    it, in words."""
    handle = _open(path)
    try:
        if not _locked(handle, path, wait):
            yield _ANOTHER
            return
        _check_exclusive(path)
        with claim(path) if locks_end_at_host(path.parent) else nullcontext("") as other:
            yield other
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    refuse_link(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _locked(handle: int, path: Path, wait: bool = False) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP
        raise UserError(f"files in {path.parent} cannot be locked ({error.strerror})", _WITH_LOCKS) from None
    return True


def _check_exclusive(path: Path) -> None:
    """Raise UserError where the lock that this process holds does not keep out a second one."""
    second = _open(path)
    try:
        if _locked(second, path):
            cause = f"locks in {path.parent} have no effect: two processes could write the same files"
            raise UserError(cause, _WITH_LOCKS)
    finally:
        os.close(second)
