"""The record of a defended model: `run.json` in its folder."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ptst.records import RunRecord


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
