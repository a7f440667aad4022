"""What a summary is computed from: a grid that is at work, or one that is read from its folder alone.

Both have cells with their figures and judged rows; only the first has models, data and settings to go on with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ptst.evaluation.tasks.table import LoadedTasks
from ptst.experiment.plan import GridCell, GridModel
from ptst.text.templates import Template

Templates = Mapping[str, tuple[Template, Path | None]]


class SummarySettings(Protocol):
    """The settings of a grid that its summary depends on."""

    @property
    def at_epochs(self) -> tuple[float, ...]: ...

    @property
    def equivalence_margin(self) -> float: ...

    @property
    def laptop(self) -> str | None: ...


class Summarized(Protocol):
    """A grid as far as `ptst.experiment.summary` reads it. `rungs`: each with `training`, `name` and `sentence`;
    `tuned`: each with `run` and `to_json()`."""

    @property
    def config(self) -> SummarySettings: ...

    @property
    def cells(self) -> Sequence[GridCell]: ...

    @property
    def runs(self) -> Sequence[GridModel]: ...

    @property
    def tasks(self) -> LoadedTasks: ...

    @property
    def train_templates(self) -> Templates: ...

    @property
    def test_templates(self) -> Templates: ...

    @property
    def tuned(self) -> Mapping[str, Any]: ...

    @property
    def rungs(self) -> Mapping[str, Any]: ...

    def cell_file(self, cell: GridCell, ending: str) -> Path: ...

    def cell_figures(self, cell: GridCell) -> dict[str, Any]: ...

    def cell_rows(self, cell: GridCell) -> list[dict[str, Any]]: ...

    def run_figures(self, model: GridModel) -> dict[str, Any]: ...
