"""Folders of arrays in the user's cache: whole or absent, proven when they are opened, and made once by the processes
that want the same one.

A folder holds files and `about.json`, which has its key, and the size and xxh3 of each file. It is written beside its
place and renamed; what a kill leaves half-written is removed when the folder is next made.
"""

import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ptst.errors import UserError
from ptst.progress import say
from ptst.storage import LOCKS, cache_home, lock, partial_path, sync, write_json

ABOUT = "about.json"
_PIECE = 1 << 24  # bytes
_OWN = "own"  # of the name of a folder that one process alone uses
MOST = 12  # folders of one kind; those used longest ago are removed


@dataclass(frozen=True)
class ArrayFolder:
    """An open folder. `about`: what its maker said of it."""

    path: Path
    about: dict[str, Any]
    kept: bool = True

    def array(self, name: str, kind: Any) -> np.ndarray:
        """A file as an array that is mapped and cannot be written."""
        path, kind = self.path / name, np.dtype(kind)
        # As a plain array: each piece of a memmap costs several times as much to take.
        return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.zeros(0, kind)

    def open(self, name: str) -> int:
        """A file's descriptor for reading."""
        return os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)


class ArrayWriter:
    """Files of a folder that is being made, under a key."""

    def __init__(self, path: Path, key: str):
        self._key = key
        self.path, self.about = path, dict[str, Any]()
        self._files: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, data: Any) -> None:
        """Add bytes, or an array, to a file."""
        if name not in self._files:
            self._files[name] = ((self.path / name).open("xb", buffering=1 << 20), xxhash.xxh3_128())
        file, digest = self._files[name]
        data = data.tobytes() if isinstance(data, np.ndarray) else data
        file.write(data)
        digest.update(data)

    def finish(self) -> None:
        """Put all on the disk."""
        digests = {}
        for name, (file, digest) in self._files.items():
            file.close()
            sync(self.path / name)
            digests[name] = [(self.path / name).stat().st_size, digest.hexdigest()]
        write_json(self.path / ABOUT, {"key": self._key, "files": digests, **self.about})
        sync(self.path)

    def close(self) -> None:
        """Close what is open, after an error."""
        for file, _ in self._files.values():
            with suppress(OSError):
                file.close()


def find_or_make(kind: str, key: str | None, make: Callable[[ArrayWriter], None], what: str) -> ArrayFolder:
    """The folder of a kind and key in the user's cache, made if it is not there; one process makes it while others
    wait. `key` None: a folder of this process alone, which the caller removes by `forget` once its files are open.
    `what`: what is made, for messages. Raises UserError for a full disk, and as `make`."""
    home = cache_home() / kind
    if key is None:
        path = partial_path(home / _OWN)
        with _disk(home, what):
            home.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(home)
            with _made(path, _OWN, make) as writer:
                about = {**writer.about}
        return ArrayFolder(path, about, kept=False)
    path = home / key
    if (found := _opened(path, what)) is not None:
        return found
    with _disk(home, what), lock(home / LOCKS, key, wait=True):
        if path.exists() and (found := _opened(path, what, quiet=True)) is not None:  # by the process that had the lock
            return found
        for old in home.glob(f".{key}.*.partial"):
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        partial = partial_path(path)
        with _made(partial, key, make):
            pass
        os.rename(partial, path)
        sync(home)
        _remove_old(home)
    found = _opened(path, what)
    assert found is not None, f"{path} was just made"
    return found


def forget(folder: ArrayFolder) -> None:
    """Remove a folder of this process alone; its open files stay readable."""
    if not folder.kept:
        shutil.rmtree(folder.path, ignore_errors=True)


@contextmanager
def _made(path: Path, key: str, make: Callable[[ArrayWriter], None]) -> Iterator[ArrayWriter]:
    path.mkdir()
    writer = ArrayWriter(path, key)
    try:
        make(writer)
        writer.finish()
        yield writer
    except BaseException:
        writer.close()
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def _disk(home: Path, what: str) -> Iterator[None]:
    """A full disk, or one that cannot be written, as a UserError."""
    remedy = "free some space, or set PTST_HOME to a folder on another disk"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: {what} cannot be written", remedy, home) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{what} cannot be written ({error.strerror})", remedy, home) from None
        raise


def _opened(path: Path, what: str, quiet: bool = False) -> ArrayFolder | None:
    """A folder whose files are as they were written; None where there is none, or it is damaged, which is said."""
    try:
        about = json.loads((path / ABOUT).read_text("utf-8"))
        if (key := about.pop("key")) != path.name:
            raise ValueError(f"it holds what belongs to {key}")
        files = about.pop("files")
        for name, (size, digest) in files.items():
            if (path / name).stat().st_size != size or _digest(path / name) != digest:
                raise ValueError(f"{name} is not what was written")
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists():
            return None
        reason: object = "a file is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error
    else:
        with suppress(OSError):
            os.utime(path)  # used last now
        return ArrayFolder(path, about)
    if not quiet:
        say(f"{what} in {path} is damaged ({reason}): it is made again")
    return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """xxh3 over every byte of a file."""
    return _digest(path)


def _remove_abandoned(home: Path) -> None:
    """Remove the folders of processes of this host that were killed."""
    host = partial_path(home / _OWN).name.split(f".{os.getpid()}.")[0]
    for path in home.glob(f"{glob.escape(host)}.*.partial"):
        pid = path.name.removeprefix(host).split(".")[1]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def _remove_old(home: Path) -> None:
    """Remove the folders that were used longest ago, beyond MOST."""
    with suppress(OSError):
        folders = [p for p in home.iterdir() if p.is_dir() and p.name != LOCKS and not p.name.startswith(".")]
        for path in sorted(folders, key=lambda p: p.stat().st_mtime)[:-MOST]:
            shutil.rmtree(path, ignore_errors=True)
