"""The record of a grid: what must be the same for a folder to be of the same grid."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ptst.records import GROWING, KNOWN, SAME, RunRecord
from ptst.text.templates import Template


@dataclass(kw_only=True)
class GridRecord(RunRecord):
    """A grid. Later commands may add templates, training data, test data and defences, but not change those that are
    there. `defenses`: what each depends on."""

    kind: ClassVar[str] = "grid"
    model: str
    weights: str = field(metadata=SAME)
    chat_format: str = field(metadata=SAME)
    family: str = field(metadata=SAME)
    dtype: str = field(metadata=SAME)
    tokenizer: str | None = field(default=None, metadata=KNOWN)
    templates: dict[str, Template] = field(metadata=GROWING)
    sources: dict[str, str] = field(metadata=GROWING)
    tests: dict[str, str] = field(metadata=GROWING)
    tuned: dict[str, str] | None = field(default=None, metadata=GROWING)
    defenses: dict[str, dict[str, Any]] | None = field(default=None, metadata=GROWING)
    endpoint: str | None = field(default=None, metadata=SAME)
