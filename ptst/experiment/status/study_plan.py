"""What a study consists of: `plan.json` in its folder, with the parts, what is to do in each, and the alignments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptst.errors import UserError
from ptst.experiment.status.items import PLAN, VERSION, Item, Items, item_of, row_of
from ptst.experiment.status.watch import Part, Watch
from ptst.records import FILE, read_json, record_kind
from ptst.storage import LOCKS, lock, remove_partial_files_of, write_json

_REMEDY = "remove it: the next worker writes it anew"


@dataclass(frozen=True)
class StudyPlan:
    """`parts`: by the name of a part's folder; `alignments`: items and the folders of aligned models. `whole`: whether
    these are all of the study."""

    folder: Path
    parts: Mapping[str, Items]
    alignments: Mapping[str, tuple[Item, Path]] = field(default_factory=dict)
    whole: bool = True

    def watch(self) -> Watch:
        """Over all parts and alignments."""
        parts = [Part(self.folder / name, f"{name}: ", items) for name, items in self.parts.items()]
        return Watch(parts, self.alignments, whole=self.folder)

    def write(self) -> None:
        with lock(self.folder / LOCKS, "plan", wait=True):
            remove_partial_files_of(self.folder / PLAN)
            parts = [
                {"folder": name, "items": [row_of(i) for i in items.values()]} for name, items in self.parts.items()
            ]
            aligned = [{"folder": str(path.absolute()), **row_of(item)} for item, path in self.alignments.values()]
            plan = {"version": VERSION, "kind": "study", "parts": parts, "alignments": aligned}
            write_json(self.folder / PLAN, plan)


def read_study(folder: Path) -> StudyPlan | None:
    """The plan of the study in a folder; of one of an earlier version its parts alone. None where there is none. Raises
    UserError for a file that is damaged."""
    path = folder / PLAN
    if not path.exists() or (folder / FILE).exists():
        return _without_plan(folder)
    values = read_json(path, _REMEDY)
    if not isinstance(values, dict) or values.get("kind") != "study":
        raise UserError("is not the plan of a study", _REMEDY, path)
    parts, aligned = values.get("parts"), values.get("alignments")
    if not isinstance(parts, list) or not isinstance(aligned, list):
        raise UserError("is not the plan of a study: it has no parts", _REMEDY, path)
    found = {}
    for part in parts:
        rows = part.get("items") if isinstance(part, dict) else None
        if not isinstance(rows, list) or not isinstance(part.get("folder"), str):
            raise UserError("is not the plan of a study: a part has no folder or no items", _REMEDY, path)
        items = (item_of(row, path) for row in rows)
        found[part["folder"]] = {item.what: item for item in items}
    models = {item.what: (item, where) for item, where in (_alignment(row, path) for row in aligned)}
    return StudyPlan(folder, found, models)


def _without_plan(folder: Path) -> StudyPlan | None:
    """Grid folders side by side are a study's, where none of them is in use otherwise: `<data>.<alignment>`."""
    if (folder / FILE).exists() or not folder.is_dir():
        return None
    names = [p.name for p in sorted(folder.iterdir()) if ".seed" in p.name or p.name.endswith(".base")]
    grids = [name for name in names if _is_grid(folder / name)]
    return StudyPlan(folder, {name: {} for name in grids}, whole=False) if grids else None


def _is_grid(folder: Path) -> bool:
    try:
        return record_kind(folder) == "grid"
    except UserError:
        return True  # whose record is damaged, which is told of it


def _alignment(row: Any, path: Path) -> tuple[Item, Path]:
    where = row.get("folder") if isinstance(row, dict) else None
    if not isinstance(where, str):
        raise UserError("is not the plan of a study: an alignment has no folder", _REMEDY, path)
    return item_of(row, path), Path(where)
