"""Who is at work in a folder, and on what, found without taking a lock.

Locks are `flock`s. Which are held, and by which process, the system tells in /proc/locks; to try one would keep it from
a worker for a moment. A worker also writes down what it does, in `workers/<host>.<process>.json`, which shows workers
on other machines that share the disk: a thread renews the file's time as long as the process lives.
"""

import glob
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ptst.reading import parse_json
from ptst.storage import LOCK, LOCKS

WORKERS = "workers"
BEAT = 10.0  # seconds between two signs of life
SILENT = 90.0  # seconds after which a worker on another machine counts as gone
_PARTIAL = ".json.partial"
_WRITES = 3.0  # seconds between two descriptions of the same work


def host() -> str:
    return socket.gethostname().replace("/", "-")[:64]


@dataclass
class Note:
    """What a worker says of itself. `doing`: names of items; `since`: when it began with them. `done` of `total` and
    `told` are of the step at hand. `failed`: errors by item."""

    host: str = field(default_factory=host)
    pid: int = field(default_factory=os.getpid)
    started: int = field(default_factory=lambda: process_start(os.getpid()))
    doing: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.time)
    told: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    beat: float = 0.0
    """When its file was last renewed."""

    @property
    def is_here(self) -> bool:
        return self.host == host()

    @property
    def alive(self) -> bool:
        if self.ended:
            return False
        if self.is_here:
            return process_start(self.pid) == self.started
        return time.time() - self.beat < SILENT

    @property
    def who(self) -> str:
        return f"process {self.pid}" + ("" if self.is_here else f" on {self.host}")


def process_start(pid: int) -> int:
    """When a process began, in ticks since the system did, which tells it from a later one of the same number; 0 where
    there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class WorkerFile:
    """This process's note in a folder, kept up to date until `close`. What keeps it from being written is no reason to
    stop the work."""

    def __init__(self, folder: Path):
        self.note = Note()
        self.path = folder / WORKERS / f"{self.note.host}.{self.note.pid}.json"
        self._written = 0.0
        self._stop = threading.Event()
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            remove_dead_notes(folder)
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    @contextmanager
    def busy(self, names: list[str]) -> Iterator[None]:
        """While this process works on these items."""
        self.note.doing, self.note.since, self.note.told = names, time.time(), ""
        self._write()
        try:
            yield
        finally:
            self.note.doing, self.note.since, self.note.told = [], time.time(), ""
            self._write()

    def tell(self, words: str) -> None:
        """How far the step at hand is; written every few seconds."""
        self.note.told = words
        if time.monotonic() - self._written > _WRITES:
            self._write()

    def fail(self, name: str, error: str) -> None:
        self.note.failed[name] = error
        self._write()

    def close(self) -> None:
        """The end: a note that tells of failures stays."""
        self._stop.set()
        self.note.ended = True
        if self.note.failed:
            self._write()
        else:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _write(self) -> None:
        self._written = time.monotonic()
        values = {name: value for name, value in asdict(self.note).items() if name != "beat"}
        partial = _partial(self.path)
        try:  # no fsync: it is worth nothing after a crash
            partial.write_text(json.dumps(values, ensure_ascii=True) + "\n")
            os.replace(partial, self.path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}{_PARTIAL}")


def remove_dead_notes(folder: Path) -> None:
    """Remove what processes of this machine that are gone left of their notes: what failed there is tried again."""
    with suppress(OSError):
        for path, other in _read_notes(folder):
            if other.is_here and not other.alive:
                path.unlink(missing_ok=True)
        for partial in (folder / WORKERS).glob(f".{glob.escape(host())}.*{_PARTIAL}"):
            pid = partial.name.removesuffix(_PARTIAL).rpartition(".")[2]
            if pid.isdecimal() and not process_start(int(pid)):
                partial.unlink(missing_ok=True)


def read_notes(folder: Path) -> list[Note]:
    """What the workers on a folder say, damaged notes left out."""
    return [note for _, note in _read_notes(folder)]


def _read_notes(folder: Path) -> Iterator[tuple[Path, Note]]:
    for path in sorted((folder / WORKERS).glob("[!.]*.json")):
        try:
            values, beat = parse_json(path.read_text()), path.stat().st_mtime
            yield path, _note(values, beat)
        except (OSError, ValueError, TypeError, KeyError):
            continue


def _note(values: Mapping[str, Any], beat: float) -> Note:
    doing, failed = values["doing"], values["failed"]
    return Note(
        host=str(values["host"]),
        pid=int(values["pid"]),
        started=int(values["started"]),
        doing=[str(name) for name in doing],
        since=float(values["since"]),
        told=str(values["told"]),
        failed={str(name): str(error) for name, error in dict(failed).items()},
        ended=bool(values["ended"]),
        beat=beat,
    )


def holders(paths: list[Path]) -> dict[Path, int] | None:
    """Which of these lock files are held, and by which process (0: one that cannot be seen from here). None where the
    system does not tell."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    by_inode: dict[int, list[tuple[str, int]]] = {}
    for line in lines:
        words = line.split()
        if "FLOCK" in words and "->" not in words:  # an arrow: one who waits
            at = words.index("FLOCK")
            device, _, inode = words[at + 4].rpartition(":")
            by_inode.setdefault(int(inode), []).append((device, max(0, int(words[at + 3]))))
    found = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        own = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        for device, pid in by_inode.get(status.st_ino, []):
            if device == own or _has_open(pid, path):
                found[path] = pid
    return found


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open: some file systems (btrfs, overlays) have two numbers for one device."""
    with suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if handle.samefile(path):
                    return True
    return False


def held_names(folder: Path) -> dict[str, int] | None:
    """The names of a shared folder's locks that are held, each with its process; None where the system does not
    tell."""
    paths = [p for p in sorted((folder / LOCKS).glob("*")) if not p.name.startswith(".")]
    found = holders(paths)
    return None if found is None else {path.name: pid for path, pid in found.items()}


def holder(folder: Path) -> int | None:
    """The process that holds a run's folder: None where none does, or the system does not tell."""
    return (holders([folder / LOCK]) or {}).get(folder / LOCK)
