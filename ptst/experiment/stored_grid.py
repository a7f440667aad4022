"""A grid's folder as it is on the disk, finished or not: every cell that can be read, what is missing, what is damaged.

Nothing but the folder is needed: no model, no data, no template files. `ptst.experiment.summary` summarizes it as it
does a grid at work.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.evaluation.tasks.table import TASKS, LoadedTasks, base
from ptst.evaluation.tasks.task import TaskData
from ptst.experiment import plan
from ptst.experiment.config import GridConfig
from ptst.experiment.grid_folder import GridFolder
from ptst.experiment.ladder.names import is_rung, parts, short
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.summarized import Templates
from ptst.records import FILE, VERSION, read_json
from ptst.text.templates import Template, find_template, load_template

_AGAIN = "remove the file, and the cell is measured again"


@dataclass(frozen=True)
class StoredSettings:
    """The settings of a stored grid that its summary depends on."""

    at_epochs: tuple[float, ...]
    equivalence_margin: float
    laptop: str | None


@dataclass(frozen=True)
class Damaged:
    """A file that cannot be used. `what`: the cell or run, in words; `why`: the whole sentence."""

    what: str
    why: str


class StoredGrid(GridFolder):
    """Raises UserError for a folder without the record of a grid. `record`: what run.json has; `results`: what
    results.json has, {} where there is none; `damaged`: what was left out of `cells`, `notes`: what else is unusual."""

    def __init__(self, out: Path):
        self.out = out
        self.record = _object(out / FILE)
        if self.record.get("kind") != "grid":
            raise UserError("holds no grid", "give the folder of a ptst.grid", out)
        _check_record(self.record, out / FILE)
        self.notes = list[str]()
        if (found := self.record.get("version", 1)) != VERSION:
            self.notes.append(f"run.json was made by another version of ptst (format {found}, not {VERSION}).")
        self.damaged = list[Damaged]()
        self.results = self._results()
        self._rows = dict[GridCell, list[dict[str, Any]]]()
        self._figures = dict[GridCell, dict[str, Any]]()
        self.cells = self._sound_cells()

    # What was asked for

    @property
    def settings(self) -> Mapping[str, Any]:
        found = self.record.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> StoredSettings:
        s = self.settings
        epochs = tuple(float(e) for e in s.get("at_epochs") or ())
        margin = float(s.get("equivalence_margin", GridConfig.equivalence_margin))
        recipe = s.get("recipe")
        return StoredSettings(epochs, margin, recipe if str(recipe).startswith("laptop") else None)

    @cached_property
    def templates(self) -> dict[str, Template]:
        """Every template of the record by name, rungs among them."""
        known = {f.name for f in fields(Template)}
        found = {}
        for name, values in (self.record.get("templates") or {}).items():
            try:
                found[name] = Template(**{k: v for k, v in values.items() if k in known})
            except (TypeError, AttributeError):
                self.notes.append(f"run.json does not describe the template {name} as this version does.")
        return found

    @cached_property
    def train_templates(self) -> Templates:
        names = [*_full(self.settings.get("train_templates")), *(c.model.template or "" for c in self.cells)]
        return self._of(names)

    @cached_property
    def test_templates(self) -> Templates:
        names = [*_full(self.settings.get("test_templates")), *(c.test for c in self.cells)]
        return self._of(names) | self._of(self.rungs)

    def _of(self, names: Any) -> dict[str, tuple[Template, Path | None]]:
        """Templates by name; one that the record lacks is taken as without a safety prompt, and told."""
        own, names = self.templates, [n for n in dict.fromkeys(names) if n]
        for name in (n for n in names if n not in own):
            note = f"run.json does not describe the template {name}, which is taken as one without a safety prompt."
            self.notes += [note] if note not in self.notes else []
        return {n: (own.get(n) or Template(n, "{question}"), None) for n in names}

    @cached_property
    def rungs(self) -> dict[str, Any]:
        """The rungs of the record: with `training`, `name` and `sentence`."""
        told = self.results.get("ladder") or {}
        trained = {short(name): name for name in self.templates if not is_rung(name)}
        found = {}
        for full in self.templates:
            if is_rung(full):
                training, name = parts(full)
                sentence = str((told.get(full) or {}).get("sentence", ""))
                training = trained.get(training, training)
                found[full] = SimpleNamespace(name=name, training=training, sentence=sentence)
        return found

    @cached_property
    def tasks(self) -> LoadedTasks:
        sets = self.results.get("sets") or {}
        tests = self.record.get("tests") or {}
        names = [n for n in dict.fromkeys([*tests, *(c.task for c in self.cells)]) if base(n) in TASKS]
        named = {n: str(sets.get(n) or n.partition(":")[2] or "built-in set") for n in names}
        return {n: (TASKS[base(n)], TaskData(named[n], [], str(tests.get(n, "")))) for n in names}

    @cached_property
    def tuned(self) -> dict[str, Any]:
        """Models that were fine-tuned elsewhere, as results.json describes them."""
        told, prints = self.results.get("tuned") or {}, self.record.get("tuned") or {}
        folders = dict(str(t).partition("=")[::2] for t in self.settings.get("tuned") or ())
        names = dict.fromkeys([*prints, *(c.model.tuned for c in self.cells if c.model.tuned)])
        return {n: _Tuned({"folder": folders.get(n), "weights": prints.get(n), **told.get(n, {})}) for n in names}

    # What there is

    @cached_property
    def planned(self) -> list[GridCell]:
        """The cells that the last command asked for."""
        s = self.settings
        trains, tests = (_full(s.get(key)) for key in ("train_templates", "test_templates"))
        seeds, defenses = s.get("seeds") or (0,), s.get("defenses") or (NONE,)
        tuned = [str(t).partition("=")[0] for t in s.get("tuned") or ()]
        models = plan.plan_models(trains, seeds, self.config.at_epochs, tuned, defenses)
        rungs = self.rungs if s.get("ladder") else {}
        specs = [str(t) for t in s.get("tasks") or ()]
        keys = [n for n in self.tasks if any(n == t or (":" in t and base(n) == base(t)) for t in specs)]
        return plan.plan_cells(models, [*tests, *rungs], keys, rungs)

    @cached_property
    def missing(self) -> list[GridCell]:
        """Cells that were asked for and are neither measured nor damaged."""
        return [cell for cell in self.planned if not self.is_measured(cell)]

    @property
    def runs(self) -> list[GridModel]:
        """One model of every run that was trained or is asked for."""
        asked = [c.model for c in (*self.planned, *self.cells) if c.model.template is not None]
        return [m.training for m in {model.run: model for model in asked}.values()]

    def run_folder(self, model: GridModel) -> Path:
        return self.out / "runs" / model.run

    def run_values(self, model: GridModel) -> dict[str, Any]:
        """What a run's record has; {} where there is none or it is damaged (`damaged` says so)."""
        path = self.run_folder(model) / FILE
        if not path.exists():
            return {}
        try:
            return _object(path)
        except UserError as error:
            entry = Damaged(f"run {model.run}", str(error))
            self.damaged += [entry] if entry not in self.damaged else []
            return {}

    def run_figures(self, model: GridModel) -> dict[str, Any]:
        values = self.run_values(model)
        trained, losses = (_dict(values.get(name)) for name in ("trained", "validation_loss"))
        counts = {k: trained.get(k) for k in ("examples", "tokens", "trained_tokens")}
        return {
            "steps": values.get("steps"),
            **counts,
            "validation_loss": {k: losses.get(k) for k in ("before", "after")},
        }

    def cell_figures(self, cell: GridCell) -> dict[str, Any]:
        if cell not in self._figures:
            self._figures[cell] = super().cell_figures(cell)
        return self._figures[cell]

    def cell_rows(self, cell: GridCell) -> list[dict[str, Any]]:
        if cell not in self._rows:
            self._rows[cell] = super().cell_rows(cell)
        return self._rows[cell]

    def _results(self) -> dict[str, Any]:
        path = self.out / "results.json"
        if not path.exists():
            return {}
        try:
            found = _object(path)
            for name in ("sets", "ladder", "tuned"):
                if not isinstance(found.get(name) or {}, dict):
                    raise UserError(f"has no object in {name}", "the file is damaged", path)
            return found
        except UserError as error:
            self.damaged.append(Damaged("results.json", str(error)))
            return {}

    def _sound_cells(self) -> list[GridCell]:
        """Every cell that can be read, in the order of models, test templates and tasks."""
        found = list[GridCell]()
        shapes = dict[tuple[Any, ...], tuple[GridCell, list[list[str]]]]()
        for path in sorted((self.out / "cells").glob("*/*.json")):
            name = path.relative_to(self.out / "cells").with_suffix("")
            try:
                cell = self._cell(path)
                shape = [list(outcome) for outcome in self._outcomes(cell)]
                key = (cell.model.trained, cell.model.epochs, cell.model.defense, cell.test, cell.task)
                first, known = shapes.setdefault(key, (cell, shape))
                if shape != known:
                    raise UserError(f"has other rows than {first.name}", _AGAIN, path)
                found.append(cell)
            except UserError as error:
                self.damaged.append(Damaged(f"cell {name}", str(error)))
        order = {cell: i for i, cell in enumerate(self._order(found))}
        return sorted(found, key=lambda cell: order[cell])

    def _cell(self, path: Path) -> GridCell:
        """The cell that a file of figures is of. Raises UserError for a file that is damaged."""
        values = _object(path)
        names = ("template", "seed", "epochs", "tuned", "defense")
        try:
            model = GridModel(**{k: values[k] for k in names if k in values})
            cell = GridCell(model, values["test"], values["task"])
            hash(cell)
            own = self.cell_file(cell, "json")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"does not say of which cell it is ({error})", _AGAIN, path) from None
        if own != path:
            raise UserError(f"is the file of another cell ({cell.name})", _AGAIN, path)
        if base(cell.task) not in TASKS:
            raise UserError(f"is of the task {cell.task}, which this version does not know", where=path)
        self.cell_figures(cell)
        return cell

    def _outcomes(self, cell: GridCell) -> list[Mapping[str, float]]:
        """Of every row. Raises UserError for rows that the task does not have."""
        path, task = self.cell_file(cell, "rows.jsonl"), TASKS[base(cell.task)]
        rows = self.cell_rows(cell)
        try:
            found = [task.outcomes(row) for row in rows]
            sound = all(v in (0, 1) or math.isnan(v) for outcome in found for v in outcome.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"has rows that are not of {cell.task} ({error!r})", _AGAIN, path) from None
        if not found or not sound:
            raise UserError("has no rows" if not found else "has outcomes that are neither 0 nor 1", _AGAIN, path)
        return found

    def _order(self, cells: Sequence[GridCell]) -> Iterator[GridCell]:
        """In the order of the settings, then as on the disk."""
        s = self.settings
        places = [
            {name: i for i, name in enumerate(names)}
            for names in (
                _full(s.get("train_templates")),
                _full(s.get("test_templates")),
                list(self.record.get("tests") or ()),
                [*(s.get("defenses") or ())],
            )
        ]

        def key(cell: GridCell) -> tuple[Any, ...]:
            m = cell.model
            own = (m.template or "", cell.test, cell.task, m.defense)
            at = [place.get(name, len(place)) for place, name in zip(places, own, strict=True)]
            kind = 0 if m.is_base else 2 if m.tuned else 1
            return (kind, at[0], own[0], at[3], m.tuned or "", m.epochs or 0.0, m.seed, at[1], own[1], at[2], own[2])

        yield from sorted(cells, key=key)


class _Tuned:
    run = None

    def __init__(self, values: dict[str, Any]):
        self.values = {"kind": "unknown", **values}

    def to_json(self) -> dict[str, Any]:
        return self.values


def _full(names: Any) -> list[str]:
    """Names of templates as cells have them: `vanilla` as `chat:vanilla`, of a file the name in it. A file that is no
    longer there is left out: its cells on the disk name it."""
    found = []
    for name in map(str, names or ()):
        try:
            found.append((load_template(Path(name)) if name.endswith(".toml") else find_template(name)).name)
        except (UserError, OSError):
            continue
    return found


# What a grid's settings have, where they have it: a list of what.
_LISTS: dict[str, tuple[type, ...]] = {"train_templates": (str,), "test_templates": (str,), "tasks": (str,)}
_LISTS |= {"seeds": (int,), "defenses": (str,), "tuned": (str,), "at_epochs": (int, float)}


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a record whose parts are not of their kind."""
    wrong = [
        name for name in ("settings", "templates", "tests", "tuned") if not isinstance(record.get(name) or {}, dict)
    ]
    settings = _dict(record.get("settings"))
    for name, kinds in _LISTS.items():
        value = settings.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, kinds) for v in value):
            wrong.append(f"settings.{name}")
    margin = settings.get("equivalence_margin", 0.0)
    wrong += [] if isinstance(margin, (int, float)) else ["settings.equivalence_margin"]
    wrong += [] if isinstance(settings.get("eval") or {}, dict) else ["settings.eval"]
    if wrong:
        raise UserError(f"is damaged: {', '.join(wrong)} cannot be read", "take the file from a copy", path)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, "the file is damaged")
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", "the file is damaged", path)
    return value
