"""Block shapes that were timed on this machine (`ptst tune-kernels`): a JSON file per GPU in $PTST_HOME/kernels."""

import json
import re
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.kernels.dispatch import triton
from ptst.storage import cache_home, write_json

VERSION = 2  # of the kernels: what was timed with others is not used


def tuned_path(gpu: str) -> Path:
    """The file of a GPU's name, as torch.cuda.get_device_name gives it."""
    return cache_home() / "kernels" / f"{re.sub('[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


def entry_name(part: str, head_dim: int, group: int) -> str:
    """The name of a pass with so many query heads to a key head, in half precision."""
    return f"{part} head_dim={head_dim} group={group}"


def read_tuned(gpu: str) -> dict[str, dict[str, Any]]:
    """Settings by entry name; empty where nothing was tuned, or with another Triton or other kernels. Raises UserError
    for a file that cannot be read."""
    return {name: dict(entry["blocks"]) for name, entry in _read(gpu).items()}


def _read(gpu: str) -> dict[str, dict[str, Any]]:
    path = tuned_path(gpu)
    if not path.exists():
        return {}
    remedy = "remove it, and tune again: ptst tune-kernels"
    try:
        found = json.loads(path.read_text())
        fits = (found["kernels"], found["triton"], found["gpu"]) == (VERSION, triton.__version__, gpu)
        entries = {name: {**entry, "blocks": dict(entry["blocks"])} for name, entry in found["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("this file of tuned kernels cannot be read", remedy, path) from error
    return entries if fits else {}


def write_tuned(gpu: str, entries: dict[str, dict[str, Any]]) -> Path:
    """Keep `entries`: {name: {"blocks": settings, "milliseconds": time}}, beside those of other names that were kept
    before. Returns the file. Raises UserError for one that cannot be read."""
    path = tuned_path(gpu)
    entries = _read(gpu) | entries
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"kernels": VERSION, "triton": triton.__version__, "gpu": gpu, "entries": entries})
    return path
