"""The record of a defended model: `run.json` in its folder, which defences write and an export tells of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ptst.errors import UserError
from ptst.records import RunRecord, find_record


@dataclass(kw_only=True)
class DefendRecord(RunRecord):
    """What a model folder or an adapter was computed from. `made_of`: name and fingerprint of each model;
    `fingerprint`: of all of it, the settings included; `weights`: of what was written; `changed`, `cosines`: of
    safe-lora and safe-merge, by projection. `training`: template and family of the tuned model's training, if known."""

    kind: ClassVar[str] = "defend"
    defense: str
    own_settings: dict[str, Any]
    made_of: dict[str, dict[str, str]]
    fingerprint: str
    changed: list[str] | None = None
    cosines: dict[str, float | None] | None = None
    training: dict[str, str] | None = None
    weights: str | None = None

    @property
    def told(self) -> str:
        """How the weights came about, in one sentence for others to read: without the folders of this machine."""
        names = {part: Path(made["name"]).name for part, made in self.made_of.items()}
        settings = ", ".join(f"{name} {value}" for name, value in self.own_settings.items() if value is not None)
        others = [f"the {part.removesuffix('_model')} model {names[part]}" for part in names if part != "tuned"]
        trained = f", trained under the template {self.training['template']}" if self.training else ""
        return f"{self.defense} ({settings}) of {names['tuned']}{trained}, with {' and '.join(others)}"


def find_told(folder: Path) -> str | None:
    """How the weights of a model folder were computed, where ptst.defend made it; None for every other folder, also for
    one whose record is damaged."""
    try:
        record = find_record(folder, DefendRecord)
    except UserError:  # a model folder serves, whatever the record in it is worth
        return None
    return None if record is None else record.told
