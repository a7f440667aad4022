"""What the cells of a grid were made of: written into each, and compared before a cell is used again.

`made_of` must be as it is now, or the figures are those of something else. `made_with` (versions, device) may differ,
and is reported where it does.
"""

from collections.abc import Mapping
from typing import Any

from ptst import records
from ptst.errors import UserError, settings_group
from ptst.evaluation.measure import reads, uses_judge
from ptst.evaluation.stored_answers import read_folder
from ptst.evaluation.stored_verdicts import keep_own, record_change
from ptst.experiment.grid import Grid
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.summarized import Summarized
from ptst.fingerprints import Fingerprint
from ptst.progress import say
from ptst.runs import setting_changes
from ptst.storage import LOCKS, lock

_NAMES = {
    "weights": "the model's weights",
    "base": "the base model's weights",
    "data": "the prompts",
    "trained_with": "the prompt of the training",
}
UNKNOWN = "an earlier version of ptst"


def made_of(grid: Grid, cell: GridCell, weights: str) -> dict[str, Any]:
    """Everything that a cell's figures depend on; `weights`: those of its model."""
    own: dict[str, Any] = {"data": grid.tasks[cell.task][1].fingerprint, "judge": grid.config.eval.judge}
    if reads(*grid.tasks[cell.task]) and (trained := grid.trained_with(cell)):
        own["trained_with"] = records.plain(trained.template) | {"chat_format": trained.chat_format.name}
    return {"weights": weights, **grid.tested_with(cell.asked), **own}


def made_with() -> dict[str, Any]:
    """The versions and the device of this process."""
    here = records.environment()
    versions = {name: here["versions"].get(name) for name in ("ptst", "torch")}
    return {**versions, **{name: here[name] for name in ("git_commit", "threads", "device")}}


def versions(figures: Mapping[str, Any]) -> str:
    """With what a cell was made, in words."""
    found = figures.get("made_with")
    if not isinstance(found, Mapping):
        return UNKNOWN
    commit = f" ({str(found.get('git_commit'))[:12]})" if found.get("git_commit") else ""
    return f"ptst {found.get('ptst')}{commit}, torch {found.get('torch')}, {found.get('device')}"


def judge_anew(grid: Grid) -> None:
    """Open the finished cells that another judge judged, or another version of the judge: their answers are kept, and
    are judged, not generated. The earlier verdicts stay, in the folder `verdicts` (docs/judges.md)."""
    cells = [cell for cell in grid.cells if grid.is_measured(cell) and _judge_change(grid, cell)]
    cells = [cell for cell in cells if grid.cell_file(cell, "answers.jsonl").exists()]
    if not cells:
        return
    change = _judge_change(grid, cells[0])
    say(f"{len(cells)} cells had another judge ({change}): their answers are judged anew, none is generated")
    keep_own(read_folder(grid.out), {f"{cell.name}.jsonl" for cell in cells})
    for cell in cells:
        with lock(grid.out / LOCKS, f"cell.{cell.name}") as mine:
            if mine and grid.is_measured(cell) and _judge_change(grid, cell):
                grid.cell_file(cell, "json").unlink()


def _judge_change(grid: Grid, cell: GridCell) -> str:
    """In what the judge of a finished cell differs from the grid's, in words; "" where it does not."""
    if not uses_judge(*grid.tasks[cell.task]):
        return ""
    figures = grid.cell_figures(cell)
    found, made = figures.get("judge"), figures.get("made_of")
    if isinstance(found, Mapping):
        return record_change(found, grid.judge_record)
    # An earlier version wrote the name alone.
    name = made.get("judge") if isinstance(made, Mapping) else next(iter(grid.cell_rows(cell)), {}).get("judge")
    now = grid.judge_record["name"]
    return "" if name in (None, now, grid.config.eval.judge) else f"name was {name}, now {now}"


def check_cells(grid: Grid) -> None:
    """Raise UserError for a finished run or cell that was made of something else than the grid's: another run's
    weights, other prompts, another template, another judge."""
    for model in grid.runs:
        check_run(grid, model)
    weights: dict[GridModel, Fingerprint] = {}
    for cell in grid.with_weights([cell for cell in grid.cells if grid.is_measured(cell)]):
        if cell.model not in weights:
            weights[cell.model] = grid.weights(cell.model)
        check_cell(grid, cell, weights[cell.model])


def check_run(grid: Grid, model: GridModel) -> None:
    """Raise UserError for a finished run of other base weights, or of other settings than the grid's."""
    record = grid.run_record(model)
    if record is None or record.status != "finished":
        return
    again = "remove the folder to train it again"
    if not grid.base_weights.matches(record.weights):
        cause = f"was trained on other weights ({record.weights}) than the base model has now ({grid.base_weights})"
        raise UserError(cause, f"put those back, or {again}", grid.run_folder(model))
    if changes := setting_changes(record, grid.train_config(model)):
        with settings_group("train"):
            words = [part for change in changes for part in ("; ", *change)][1:]
            raise UserError(("is a run of other settings: ", *words), again, grid.run_folder(model))


def check_cell(grid: Grid, cell: GridCell, weights: str) -> None:
    """Raise UserError for a finished cell made of something else. One of an earlier version says nothing of it."""
    was, now = grid.cell_figures(cell).get("made_of"), made_of(grid, cell, weights)
    path = grid.cell_file(cell, "json")
    if change := _judge_change(grid, cell):
        cause = f"was judged by another judge than now: {change}"
        remedy = "start again to judge its answers anew"
        if not grid.cell_file(cell, "answers.jsonl").exists():
            remedy = f"remove {path.with_suffix('')}.* to measure it again"
        raise UserError(cause, remedy, path)
    if not isinstance(was, Mapping):
        return
    for name, value in now.items():
        if name != "judge" and name in was and was[name] != value:
            cause = f"was measured with other things than now: {_change(name, was[name], value)}"
            raise UserError(cause, f"put those back, or remove {path.with_suffix('')}.* to measure it again", path)


def _change(name: str, was: Any, now: Any) -> str:
    shown = [f"{str(value)[:57]}..." if len(str(value)) > 60 else str(value) for value in (was, now)]
    return f"{_NAMES.get(name, f'the {name}')} was {shown[0]}, now {shown[1]}"


def mixed(grid: Summarized) -> dict[GridCell, str]:
    """With what each cell was made, where that is not the same for all."""
    found = {cell: versions(grid.cell_figures(cell)) for cell in grid.cells}
    return found if len(set(found.values())) > 1 else {}
