"""The run folder: what was run, what came of it, and whether it is whole.

`run.json` is written first with status "running" and last with "finished"; only finished runs are ever picked up. Every
file is written under a temporary name, synced and renamed, so no kill leaves a half-written one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ptst import __version__
from ptst.errors import UserError
from ptst.model.config import read_json
from ptst.storage import write_atomically


def create(out: Path | None, checkpoints: Path, kind: str) -> Path:
    """Make a new empty folder: `out`, or `checkpoints/<kind>-<date>-<time>`. Raises UserError when `out` is in use."""
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = [f"{kind}-{stamp}", *(f"{kind}-{stamp}-{n}" for n in range(2, 100))]
        out = next(p for p in (checkpoints / n for n in names) if not p.exists())
    # What a kill left of the very first file is not an earlier run.
    if out.exists() and (not out.is_dir() or any(not p.match(".*.json.*.partial") for p in out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out, so that no earlier run is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove_partial_files(out: Path) -> None:
    """Remove the half-written files that a kill left."""
    for path in out.glob(".*.partial"):
        path.unlink()


def append_jsonl(path: Path, row: dict) -> None:
    """Add one row to a JSONL file, flushed to the disk's care."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_run(checkpoints: Path) -> Path:
    """The newest finished training run. Raises UserError when there is none."""
    runs = []
    for path in checkpoints.glob("*/run.json"):
        try:
            run = read_json(path)
        except ValueError:
            continue  # a damaged run is not a finished one
        if run.get("kind") == "train" and run.get("status") == "finished":
            runs.append((run.get("finished_at", 0.0), path.parent))
    if not runs:
        raise UserError(
            f"no finished training run in {checkpoints}/; train first, or evaluate an untouched model with --model"
        )
    return max(runs)[1]


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a finished training run. Raises UserError when it is absent or the run did not finish."""
    path = Path(folder) / "run.json"
    if not path.exists():
        raise UserError(
            f"{folder} is not a run folder (it has no run.json); give --checkpoint a folder made by training"
        )
    run = read_json(path)
    if run.get("kind") != "train" or run.get("status") != "finished":
        raise UserError(f"{folder} is not a finished training run (status {run.get('status')!r}); train it again")
    return run


def environment() -> dict[str, Any]:
    """Versions, threads, machine and git commit, for run.json."""
    import torch

    versions: dict[str, str | None] = {"ptst": __version__}
    for name in ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parents[2]
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
