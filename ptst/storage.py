"""Files that are whole or absent (temporary name, fsync, rename), rows added to a file, and locks between processes."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ptst.errors import Setting, UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` on a normal exit and is removed on an error. A kill at any
    instant leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSONL file; `sync` makes sure that it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
    """Remove the half-written files that a kill left."""
    for path in folder.glob(".*.partial"):
        path.unlink()


@contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """Hold a run folder. Raises UserError where another process does; the lock of a killed one is released."""
    with _lock(out, os.O_RDONLY) as held:
        if not held:
            raise UserError(f"{out} is in use by another process", ("wait for it, or choose another ", Setting("out")))
        yield


def lock(folder: Path, name: str, *, wait: bool = False) -> AbstractContextManager[bool]:
    """Whether this process got the lock of that name, a file in `folder`. `wait`: until it has."""
    folder.mkdir(parents=True, exist_ok=True)
    return _lock(folder / name.replace("/", "."), os.O_RDWR | os.O_CREAT, wait)


@contextmanager
def _lock(path: Path, flags: int, wait: bool = False) -> Iterator[bool]:
    handle = os.open(path, flags, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
